"""Adapting a plain model as a file says, and taking it back where the rest does not fit."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from adapterzoo.checkpoint.describe import DTYPES
from adapterzoo.checkpoint.manifest import LayerEntry
from adapterzoo.layer import adapted_layers
from adapterzoo.pieces import Piece
from adapterzoo.surgery import adapt, unload
from adapterzoo.targets import Pattern


def adapt_as(model: nn.Module, layers: Sequence[LayerEntry], specs: Sequence[Piece]) -> None:
    """Adapt the layers that a file names, each as it was, and freeze the rest.

    Args:
        model: a model without adapters.
        layers: the layers of the file.
        specs: its compositions.

    Raises:
        AdapterError: what `adapt` raises. The layers of earlier groups may be adapted then.
    """
    for members in _alike(layers):
        dtype, first = members[0].factor_dtype, members[0]
        targets: dict[Pattern, Piece | None] = {
            re.compile("|".join(re.escape(m.names[0]) for m in members if m.composition == i)): specs[i]
            for i in dict.fromkeys(member.composition for member in members)
        }
        adapt(
            model,
            targets=targets,
            seed=first.seed,
            adapter_dtype=None if dtype is None else DTYPES[dtype],
            lean=first.lean,
        )


@contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Where the body fails, take off adapters that it has made, and put back what trained."""
    plain = not adapted_layers(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        if plain and adapted_layers(model):
            unload(model, merge=False)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def _alike(layers: Sequence[LayerEntry]) -> list[list[LayerEntry]]:
    """Layers in groups that one call of `adapt` can make."""
    groups: dict[tuple[object, ...], list[LayerEntry]] = {}
    for layer in layers:
        groups.setdefault((layer.seed, layer.factor_dtype, layer.lean), []).append(layer)
    return list(groups.values())
