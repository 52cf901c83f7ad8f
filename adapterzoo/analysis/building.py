"""Models without weights: built on the meta device from a published name or a Transformers config; copies of models."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from adapterzoo.analysis.architectures import ARCHITECTURES
from adapterzoo.errors import AdapterError, ArchitectureError, MissingPackageError, did_you_mean

DTYPES: Mapping[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The dtypes that a model may be counted in, by name."""


def published(name: str, dtype: torch.dtype | None = None) -> nn.Module:
    """A published model on the meta device: shapes without values, in seconds, whatever its size.

    Args:
        name: one of `adapterzoo.analysis.architectures.ARCHITECTURES`.
        dtype: of its weights; the one that they are published in if None.

    Raises:
        ArchitectureError: no such name; lists the known ones and the nearest.
        MissingPackageError: Transformers is not installed.
    """
    check_published(name)
    known = ARCHITECTURES[name]
    kind = getattr(_transformers(), known.model)
    return _built(kind, kind.config_class(**known.config), dtype or DTYPES[known.dtype])


def check_published(name: str) -> None:
    """Raise an ArchitectureError unless it is the name of a published model."""
    if name not in ARCHITECTURES:
        hint = "; a config of your own is a pathlib.Path, or --config" if name.endswith(".json") else ""
        known = ", ".join(ARCHITECTURES)
        raise ArchitectureError(
            f"unknown architecture {name!r}; known: {known}{hint or did_you_mean(name, ARCHITECTURES)}"
        )


def from_config(path: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a Transformers config.json on the meta device.

    It is the class that the config names under "architectures", else what AutoModel builds. No code of the config's is
    run: a model that is not in Transformers itself is refused.

    Args:
        path: the file.
        dtype: of its weights; the config's own if None, else float32.

    Raises:
        ArchitectureError: no such file, no config, or one that Transformers builds no model from.
        MissingPackageError: Transformers is not installed.
    """
    fields = _read(path)
    transformers = _transformers()
    known = transformers.CONFIG_MAPPING
    model_type = fields.get("model_type")
    if model_type not in list(known):
        near = did_you_mean(str(model_type), list(known))
        raise ArchitectureError(f"{path}: Transformers has no model_type {model_type!r}{near}")
    dtype = dtype or _dtype_of(path, fields)
    try:
        config = known[model_type].from_dict(dict(fields))
        return _built(_model_class(transformers, config, fields), config, dtype)
    except AdapterError as error:
        raise type(error)(f"{path}: {error}") from None
    except Exception as error:  # a config can be wrong in as many ways as there are models
        raise ArchitectureError(f"{path}: Transformers builds no model from it: {_first_line(error)}") from None


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model whose ordinary parameters and buffers are on the meta device: it takes no memory for values.

    Tensors of classes of their own, quantised weights that is, are copied as they are.
    """
    stands_for: dict[int, Any] = {}
    for value in (*model.parameters(), *model.buffers()):
        if type(value) is nn.Parameter:
            stands_for[id(value)] = nn.Parameter(value.detach().to("meta"), value.requires_grad)
        elif type(value) is torch.Tensor:
            stands_for[id(value)] = value.detach().to("meta")
    return copy.deepcopy(model, stands_for)


def _transformers() -> ModuleType:
    try:
        import transformers  # heavy and optional
    except ImportError:
        raise MissingPackageError(
            "models by name or config are built by Transformers, which is not installed: "
            "pip install 'adapterzoo[models]'; a model that you build yourself needs nothing more"
        ) from None
    return transformers  # type: ignore[no-any-return]


def _built(kind: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        model = kind(config)
    assert isinstance(model, nn.Module)
    return model.to(dtype)


def _model_class(transformers: ModuleType, config: Any, fields: Mapping[str, Any]) -> Any:
    """The class that a config names; AutoModel's choice where it names none."""
    named = fields.get("architectures") or [transformers.MODEL_MAPPING[type(config)].__name__]
    kind = getattr(transformers, str(named[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        near = did_you_mean(str(named[0]), [name for name in dir(transformers) if name.startswith(str(named[0])[:3])])
        raise ArchitectureError(f"Transformers has no model class {named[0]!r}{near}")
    if getattr(kind, "config_class", None) is not type(config):
        raise ArchitectureError(f"{named[0]} is not built from a config of model_type {config.model_type!r}")
    return kind


def _read(path: Path) -> dict[str, Any]:
    """The fields of a config file."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArchitectureError(f"{path} can't be read: {error.strerror}; give the path of a config.json") from None
    except (ValueError, RecursionError) as error:
        raise ArchitectureError(f"{path} is not JSON: {_first_line(error)}") from None
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ArchitectureError(f'{path} is no config of Transformers: it has no "model_type"')
    return fields


def _dtype_of(path: Path, fields: Mapping[str, Any]) -> torch.dtype:
    named = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    if named not in list(DTYPES):
        raise ArchitectureError(f"{path}: unknown dtype {named!r}; known: {', '.join(DTYPES)}")
    return DTYPES[named]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
