"""Whether PEFT can hold what a model's adapters are, and computes it rightly."""

from collections.abc import Mapping

import torch
from torch import nn

from adapterzoo.conditioning import DoRA
from adapterzoo.interop.peft_layouts import has_format
from adapterzoo.interop.staged import compiled_inside
from adapterzoo.layer import AdaptedLinear
from adapterzoo.methods import AdaLoRA, LoRA
from adapterzoo.pieces import Piece, layers_of
from adapterzoo.sharded import wrapper_of_processes

_INSTEAD = "merge_and_save writes merged weights, export_lora a LoRA by SVD"


def misfits(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> list[str]:
    """Everything that stands against an export, as sentences that name layers."""
    found = [f"{name}: {problem}" for name, layer in layers.items() if (problem := _misfit(layer)) is not None]
    found += [*several_names(model), *compiled_inside(model)]
    wrapper = wrapper_of_processes(model)
    if wrapper is not None:
        found.append(f"the model is in a {wrapper}, which changes the names of its layers; export the model inside it")
    return found or _differences({name: layer.spec for name, layer in layers.items()})


def several_names(model: nn.Module) -> list[str]:
    """Adapted layers that a model has under several names, as sentences."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AdaptedLinear):
            names.setdefault(module, []).append(name)
    return [
        f"{' = '.join(own)}: one layer with several names; PEFT adapts the first alone"
        for own in names.values()
        if len(own) > 1
    ]


def _misfit(layer: AdaptedLinear) -> str | None:
    if not has_format(layer.spec):
        return f"PEFT has no format for {layer.spec!r}; it has LoRA, DoRA(LoRA) and AdaLoRA. {_INSTEAD}"
    if any(value.is_meta for value in layer.adapter.state_dict().values()):
        return "it is on the meta device and has no values yet"
    if not all(bool(value.isfinite().all()) for value in layer.adapter.state_dict().values()):
        return "its adapter has values that are not finite"
    wrong = wrong_on_kind(layer, layer.spec)
    return _zero_rows(layer) if wrong is None else f"{wrong}. {_INSTEAD}"


def wrong_on_kind(layer: AdaptedLinear, spec: Piece) -> str | None:
    """Say why PEFT does not adapt a kind of layer with a spec, or computes it wrongly; None if it does it right."""
    adaptive = isinstance(spec, AdaLoRA)
    if adaptive and (layer.kind == "embedding" or len(layer.shape.kernel) in (1, 3)):
        return f"PEFT has no AdaLoRA for {type(layer.base).__name__}"
    base = layer.base
    if not isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    if base.groups > 1:
        return f"groups={base.groups}: PEFT's adapter of it is another function, that mixes groups"
    if base.padding_mode != "zeros":
        return f"padding_mode={base.padding_mode!r}: PEFT pads the adapter's input with zeros"
    if set(base.dilation) != {1} and not adaptive:
        return f"dilation={base.dilation}: PEFT's adapter of it has none, and its forward fails"
    return None


@torch.no_grad()
def _zero_rows(layer: AdaptedLinear) -> str | None:
    """PEFT's DoRA divides by the norms of the rows of W + Δ."""
    if not isinstance(layer.spec, DoRA) or layer.adapter.inner is None:
        return None
    zero = (layer.adapter.inner.weight(layer.site()).row_norms() == 0).nonzero()[:, 0].tolist()
    if not zero:
        return None
    rows = f"{', '.join(map(str, zero[:5]))}{', ...' if len(zero) > 5 else ''}"
    return f"W + Δ has {len(zero)} zero rows ({rows}), where PEFT's DoRA is NaN. {_INSTEAD}"


def _differences(specs: Mapping[str, Piece]) -> list[str]:
    """One config of PEFT's has one method, one dropout and so on; only LoRA's r and alpha may differ."""
    groups: dict[str, list[str]] = {}
    for name, spec in specs.items():
        groups.setdefault(_said_once(spec), []).append(name)
    if len(groups) == 1:
        return []
    rows = [f"{what}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" for what, names in groups.items()]
    return [f"layers differ in what an adapter of PEFT's says once for all of them. {_INSTEAD}", *rows]


def _said_once(spec: Piece) -> str:
    generator = layers_of(spec)[-1]
    if isinstance(generator, AdaLoRA):
        return repr(generator)
    method = "DoRA(LoRA)" if isinstance(spec, DoRA) else "LoRA"
    assert isinstance(generator, LoRA)
    return f"{method} with dropout={generator.dropout}, rslora={generator.rslora}"
