"""Adapters to PEFT's files."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapterzoo.errors import PeftError, TargetError
from adapterzoo.interop.peft_files import write_pair
from adapterzoo.interop.peft_fit import misfits
from adapterzoo.interop.peft_layouts import slots, to_file
from adapterzoo.interop.peft_names import PREFIX, exact_patterns, exact_targets
from adapterzoo.interop.peft_trained import trained_elsewhere
from adapterzoo.layer import AdaptedLinear, adapted_layers
from adapterzoo.methods import AdaLoRA, LoRA
from adapterzoo.methods.scaled import RankScaled
from adapterzoo.pieces import Piece, layers_of
from adapterzoo.sharded import gathered, inside, is_sharded, reshard
from adapterzoo.watch import WATCH

_WHAT = "this model can't be written in PEFT's format, and nothing was written"


@dataclass(frozen=True)
class PeftLayer:
    """What one layer's adapter is in PEFT's format.

    Args:
        layer: the layer that it is for.
        spec: LoRA, DoRA(LoRA) or AdaLoRA.
        values: the parameters by their names there, such as A: [r, in] and B: [out, r], and AdaLoRA's mask.
    """

    layer: AdaptedLinear
    spec: Piece
    values: Mapping[str, Tensor]

    @property
    def generator(self) -> RankScaled:
        """The innermost piece."""
        found = layers_of(self.spec)[-1]
        assert isinstance(found, RankScaled)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """By what follows the layer's name in a key."""
        values = to_file(self.spec, self.values)
        rank = values["P" if "P" in values else "B"].shape[1]
        places = slots(self.spec, self.layer.kind, self.layer.shape, rank)
        return {slot.suffix: values[own].reshape(slot.shape) for own, slot in places.items()}


def export_peft(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    task_type: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write the adapters of a model as an adapter of Hugging Face's PEFT: `PeftModel.from_pretrained(base, directory)`.

    LoRA, DoRA(LoRA) and AdaLoRA can be written, on every layer of the model the same one, up to LoRA's r and alpha.
    What `adapt(..., train=[...])` has kept trainable is written too, as PEFT's modules_to_save. The model is left as it
    is; peft is not needed. A model in shards (FSDP2) is exported by all its processes together.

    Args:
        model: a model with adapted layers.
        directory: where to; an adapter that is there is replaced, other files are left alone.
        task_type: PEFT's name of the task, such as "CAUSAL_LM" or "SEQ_CLS"; None is fine.
        base_model: name or path of the base model; what the model itself says of it if None.

    Raises:
        TargetError: no adapted layer.
        PeftError: layers, compositions or trained parameters that PEFT has no format for, or would compute wrongly, all
            at once. Nothing was written.
        ExportError: the directory is a file.

    Example:
        >>> import tempfile, torch
        >>> from adapterzoo import LoRA, adapt, export_peft
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> plan = adapt(model, LoRA(r=2, alpha=8))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     export_peft(model, directory)
        ...     sorted(path.name for path in __import__("pathlib").Path(directory).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    model = inside(model)
    reshard(model)  # what FSDP2 has gathered for a forward is thrown away
    layers = adapted_layers(model)
    if not layers:
        raise TargetError(f"this {type(model).__name__} has no adapted layer; adapt(model, spec) makes them")
    problems = misfits(model, layers)
    if problems:
        raise PeftError(_WHAT, problems)
    write_adapter(
        model,
        directory,
        {name: PeftLayer(layer, layer.spec, _values(layer)) for name, layer in layers.items()},
        task_type=task_type,
        base_model=base_model,
    )


def write_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    layers: Mapping[str, PeftLayer],
    *,
    task_type: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write adapters that are in PEFT's form already, and what else trains in a model.

    Args:
        model: the model that they are for.
        directory: where to.
        layers: the adapter of each layer, by its name; one composition for all, but for LoRA's r and alpha.
        task_type: see export_peft.
        base_model: see export_peft.

    Raises:
        PeftError: something else that trains, and that PEFT has no place for. Nothing was written.
        ExportError: the directory is a file.
    """
    trained = trained_elsewhere(model)
    if trained.problems:
        raise PeftError(_WHAT, trained.problems)
    names = [name for name, _ in model.named_modules()]
    config = {
        **_origin(model, task_type, base_model),
        **_method(layers),
        "bias": trained.bias,
        "fan_in_fan_out": any(item.layer.kind == "transposed" for item in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": trained.modules or None,
        "target_modules": exact_targets(list(layers), names),
    }
    tensors = {f"{name}.{suffix}": value for name, item in layers.items() for suffix, value in item.tensors().items()}
    if _writes(layers):
        write_pair(directory, config, {PREFIX + key: value for key, value in {**tensors, **trained.tensors}.items()})


def _writes(layers: Mapping[str, PeftLayer]) -> bool:
    """Whether this process writes: of those that hold one model in shards, only the first does."""
    values = (value for item in layers.values() for value in item.layer.adapter.parameters())
    return not any(map(is_sharded, values)) or torch.distributed.get_rank() == 0


@torch.no_grad()
def _values(layer: AdaptedLinear) -> dict[str, Tensor]:
    """Every parameter and buffer of the composition, by its own name: no two pieces of these have one of a name."""
    parts = layer.adapter.parts()
    return {name: gathered(value.detach()) for part in parts for name, value in part.values().items()}


def _origin(model: nn.Module, task_type: str | None, base_model: str | None) -> dict[str, Any]:
    own = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    kind = type(model)
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {
        "auto_mapping": mapping if task_type is None else None,
        "base_model_name_or_path": base_model or (own if isinstance(own, str) else None) or None,
        "revision": None,
        "task_type": task_type,
    }


def _method(layers: Mapping[str, PeftLayer]) -> dict[str, Any]:
    """The fields that say what is adapted how."""
    generators = {name: item.generator for name, item in layers.items()}
    one = next(iter(generators.values()))
    common = {"lora_dropout": one.dropout, "use_dora": len(layers_of(next(iter(layers.values())).spec)) > 1}
    if isinstance(one, AdaLoRA):
        return {**common, **_adalora(one, layers)}
    rank, ranks = exact_patterns({name: item.r for name, item in generators.items()})
    alpha, alphas = exact_patterns({name: _number(item.numerator) for name, item in generators.items()})
    return {
        **common,
        "alpha_pattern": alphas,
        "lora_alpha": alpha,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": ranks,
        "use_rslora": isinstance(one, LoRA) and one.rslora,
    }


def _adalora(spec: AdaLoRA, layers: Mapping[str, PeftLayer]) -> dict[str, Any]:
    attended = [WATCH.attendant_of(item.layer) for item in layers.values()]
    total = next((attendant.total_steps for attendant in attended if attendant is not None), 0)
    return {
        "beta1": spec.beta1,
        "beta2": spec.beta2,
        "deltaT": spec.delta_t,
        "init_r": spec.r,
        "lora_alpha": _number(spec.numerator),
        "orth_reg_weight": spec.orth_weight,
        "peft_type": "ADALORA",
        "rank_pattern": _pruned(spec, layers),
        "target_r": spec.r if spec.target_r is None else spec.target_r,
        "tfinal": spec.t_final,
        "tinit": spec.t_init,
        "total_step": max(total, spec.t_init + spec.t_final + 1),
    }


def _pruned(spec: AdaLoRA, layers: Mapping[str, PeftLayer]) -> dict[str, list[bool]] | None:
    """Which ranks are left, for the layers that have lost some. After `compact` only their number is known."""
    kept = {name: (item.values["mask"] != 0).tolist() for name, item in layers.items()}
    patterns = {name: own + [False] * (spec.r - len(own)) for name, own in kept.items()}
    return {_rank_key(name): own for name, own in patterns.items() if not all(own)} or None


def _rank_key(name: str) -> str:
    """PEFT takes two parts off the end of a key that has the adapter's name, "default", anywhere in it, else one."""
    return f"{name}.lora_E.default" if "default" in name else f"{name}.lora_E"


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value
