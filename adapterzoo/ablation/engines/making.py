"""Engines by name, with options as text or a file gives them."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pydantic import BaseModel, ValidationError

from adapterzoo.ablation.engines.engine import Engine
from adapterzoo.errors import GridError, MissingPackageError, did_you_mean, listing


@dataclass(frozen=True)
class Kind:
    """Where an engine stands.

    Args:
        module, cls: its class.
        package: what it needs beside this package, and the extra that brings it.
    """

    module: str
    cls: str
    package: str | None = None


ENGINES = {
    "local": Kind("local", "LocalEngine"),
    "ray": Kind("ray", "RayEngine", "ray"),
    "slurm": Kind("slurm", "SlurmEngine", "submitit"),
    "inline": Kind("inline", "InlineEngine"),
}
_EXTRAS = {"ray": "ray", "submitit": "slurm"}


def make_engine(name: str, options: Mapping[str, Any] | None = None) -> Engine:
    """An engine.

    Args:
        name: "local", "ray", "slurm" or "inline".
        options: as its `Options` has them.

    Raises:
        GridError: an unknown engine, or options that it does not have or take; all are listed.
        MissingPackageError: the package that it stands on is not installed.

    Example:
        >>> make_engine("local", {"workers": 3}).capacity
        3
        >>> make_engine("local", {"wokers": 3})
        Traceback (most recent call last):
        adapterzoo.errors.GridError: engine 'local':
          - no option 'wokers'; it has workers, threads, gpus, per_gpu, fresh, perform, warm; did you mean 'workers'?
    """
    if name not in ENGINES:
        raise GridError(f"unknown engine {name!r}; known engines: {', '.join(ENGINES)}{did_you_mean(name, ENGINES)}")
    cls = _engine_class(name)
    try:
        read = cls.Options(**(options or {}))
    except ValidationError as error:
        raise GridError(f"engine {name!r}:{listing(_problems(cls.Options, error))}") from None
    engine: Engine = cls(read)
    return engine


def _engine_class(name: str) -> Any:
    kind = ENGINES[name]
    try:
        module = import_module(f"adapterzoo.ablation.engines.{kind.module}")
    except ModuleNotFoundError as error:
        if kind.package is None or (error.name or "").split(".")[0] != kind.package:
            raise
        raise MissingPackageError(
            f"the engine {name!r} needs the package {kind.package!r}, which is not installed: "
            f'pip install "adapterzoo[{_EXTRAS[kind.package]}]"'
        ) from error
    return getattr(module, kind.cls)


def _problems(options: type[BaseModel], error: ValidationError) -> list[str]:
    found = []
    for item in error.errors():
        option = str(item["loc"][0]) if item["loc"] else ""
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            known = list(options.model_fields)
            found.append(f"no option {option!r}; it has {', '.join(known)}{did_you_mean(option, known)}")
        else:
            found.append(f"{option} = {item['input']!r}: {message}" if option else message)
    return list(dict.fromkeys(found))
