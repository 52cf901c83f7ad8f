"""How many numbers an adapter trains, and what they weigh: counted by adapting a model that holds no values."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from adapterzoo.analysis.building import from_config, published, skeleton
from adapterzoo.analysis.counts import Count, LayerCount
from adapterzoo.errors import ArchitectureError
from adapterzoo.layer import AdaptedLinear, adapted_layers
from adapterzoo.pieces import Piece
from adapterzoo.quantised import numbers
from adapterzoo.surgery import adapt
from adapterzoo.targets import ALL_LINEAR, Pattern, Targets


def count(
    model: str | Path | nn.Module,
    spec: Piece | None = None,
    targets: Targets = ALL_LINEAR,
    *,
    exclude: Sequence[Pattern] = (),
    train: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype | None = None,
    per_layer: bool = False,
) -> Count:
    """Count the parameters of an adapted model, by adapting it on the meta device: what is counted is what is built.

    Nothing holds values, so a model of 70 billion parameters takes seconds and little memory. A model that is given is
    left as it is.

    Args:
        model: a published name such as "llama-7b", the pathlib.Path of a Transformers config.json, or a model. A model
            that is adapted already is counted as it stands, if neither spec nor targets are given.
        spec: as `adapt` takes it, and so are targets, exclude, train and adapter_dtype.
        dtype: of the base, for a name or a config; the published one if None.
        per_layer: show every layer instead of groups of like ones.

    Returns:
        The count; `print(count)` shows it.

    Raises:
        ArchitectureError: an unknown name, a config that no model is built from, or a dtype for a finished model.
        MissingPackageError: a name or a config without Transformers.
        AdapterError: what `adapt` refuses.

    Example:
        >>> from torch import nn
        >>> from adapterzoo import DoRA, LoRA, count
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        >>> print(count(model, DoRA(LoRA(r=2))))
        Sequential in float32, with DoRA(LoRA(r=2))
        <BLANKLINE>
        layers  number  out x in  each  parameters
        0            1  128 x 64   512         512
        2            1  64 x 128   448         448
        <BLANKLINE>
                                  parameters      bytes
        base                          16,576  64.75 KiB
        adapters                         960   3.75 KiB
        trainable, its gradients         960   3.75 KiB
        Adam's two states              1,920   7.50 KiB
        <BLANKLINE>
        5.4745% of the model with its adapters trains (what papers print as Params), 5.7915% of the base
    """
    title = type(model).__name__ if isinstance(model, nn.Module) else str(model)
    if isinstance(model, nn.Module) and dtype is not None:
        raise ArchitectureError(
            "dtype is for models by name or config; this one has its dtype: model.to(dtype) casts it"
        )
    asked = spec is not None or targets != ALL_LINEAR or exclude or train or adapter_dtype
    if isinstance(model, nn.Module) and not asked and adapted_layers(model):
        return counted(model, title, per_layer)
    built = _without_values(model, dtype)
    adapt(built, spec, targets, exclude=exclude, train=train, adapter_dtype=adapter_dtype)
    return counted(built, title, per_layer)


def counted(model: nn.Module, title: str, per_layer: bool = False) -> Count:
    """Count an adapted model as it stands.

    Args:
        model: a model with adapted layers.
        title: what to call it.
        per_layer: see `count`.
    """
    layers = adapted_layers(model)
    own = {id(value) for layer in layers.values() for value in layer.adapter.parameters()}
    base = [value for value in model.parameters() if id(value) not in own]
    trained = [value for value in model.parameters() if value.requires_grad]
    return Count(
        model=title,
        kind=type(model).__name__,
        dtype=_dtypes(base),
        layers=tuple(_layer_count(name, layer) for name, layer in layers.items()),
        base_parameters=sum(map(numbers, base)),
        trainable_parameters=sum(value.numel() for value in trained),
        base_bytes=sum(map(_bytes, base)),
        adapter_bytes=sum(_bytes(v) for layer in layers.values() for v in layer.adapter.state_dict().values()),
        gradient_bytes=sum(map(_bytes, trained)),
        per_layer=per_layer,
    )


def _without_values(model: str | Path | nn.Module, dtype: torch.dtype | None) -> nn.Module:
    if isinstance(model, str):
        return published(model, dtype)
    if isinstance(model, Path):
        return from_config(model, dtype)
    if not isinstance(model, nn.Module):
        raise ArchitectureError(
            f"count takes a published name, a pathlib.Path of a config.json, or a model, not {type(model).__name__}"
        )
    return skeleton(model)


def _layer_count(name: str, layer: AdaptedLinear) -> LayerCount:
    parameters = sum(value.numel() for value in layer.adapter.parameters())
    return LayerCount(name, layer.spec, (layer.out_features, layer.in_features), parameters)


def _bytes(value: Tensor) -> int:
    """What a tensor takes; a quantised one is made of others."""
    if not hasattr(value, "__tensor_flatten__"):
        return value.numel() * value.element_size()
    parts, _ = value.__tensor_flatten__()
    return sum(_bytes(getattr(value, part)) for part in parts)


def _dtypes(values: Iterable[Tensor]) -> str:
    """The dtypes of tensors by name, the one with most numbers first."""
    sizes: Counter[str] = Counter()
    for value in values:
        sizes[str(value.dtype).removeprefix("torch.")] += value.numel()
    return ", ".join(name for name, _ in sizes.most_common()) or "no dtype"
