"""The penalties that pieces declare, summed over a model."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterzoo.adapter import Adapter
from adapterzoo.errors import TrainingError
from adapterzoo.layer import adapted_layers
from adapterzoo.pieces import Parameters, Piece
from adapterzoo.precision import full_precision
from adapterzoo.sharded import gathered
from adapterzoo.watch import WATCH


def penalty(model: nn.Module) -> Tensor:
    """The sum of the penalties that the pieces of a model declare: a term of the loss, whatever the model returns.

    `attach` adds its gradient by itself; use this in a loop that adds it to the loss, with `add_penalty=False` there.
    Frozen pieces count too. Pieces without a penalty, and a model without adapted layers, give zero.

    Args:
        model: a model with adapted layers.

    Returns:
        [], float32 or wider, differentiable. Its backward is a TrainingError where `attach` adds its gradient already.

    Example:
        >>> import torch
        >>> import adapterzoo as az
        >>> layer = az.AdaptedLinear(torch.nn.Linear(6, 4), az.AdaLoRA(r=2, orth_weight=0.5))
        >>> round(az.penalty(layer).item(), 2)  # about 0.5 √2: P and Q start near zero
        0.7

    Source:
        AdaLoRA's orthogonality: Zhang et al., arXiv 2303.10512, eq. 4, in the form of its published code.
    """
    total = total_of(penalised(model))
    if total.requires_grad and _is_added(model):
        total.register_hook(_refuse)  # type: ignore[no-untyped-call]
    return total


def penalised(model: nn.Module) -> list[tuple[Adapter, int]]:
    """Every piece that declares a penalty, and how many pieces of its class the model has."""
    parts = [part for layer in adapted_layers(model).values() for part in layer.adapter.parts()]
    siblings = Counter(type(part.spec) for part in parts)
    with torch.no_grad():
        return [
            (part, siblings[type(part.spec)])
            for part in parts
            if part.spec.penalty(Parameters(_values(part)), siblings[type(part.spec)]) is not None
        ]


def total_of(pieces: Sequence[tuple[Adapter, int]]) -> Tensor:
    """The penalties of pieces that declare one, summed: []. Pieces that are alike are computed together."""
    alike: dict[Any, list[tuple[Adapter, dict[str, Tensor]]]] = defaultdict(list)
    for part, siblings in pieces:
        values = _values(part)
        kinds = tuple((value.shape, value.dtype, value.device) for value in values.values())
        alike[part.spec, siblings, kinds].append((part, values))
    total = torch.zeros(())
    for (spec, siblings, kinds), entries in alike.items():
        with full_precision(kinds[0][2].type):
            term = _together(spec, siblings, [values for _, values in entries])
        total = total.to(term.device) + term
    return total


def gradients_of_total(pieces: Sequence[tuple[Adapter, int]], wanted: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of the sum by some of the pieces' parameters, and the sum itself as the last entry."""
    with torch.enable_grad(), full_precision(wanted[0].device.type):
        total = total_of(pieces)
        return [*torch.autograd.grad(total, list(wanted), allow_unused=True), total.detach()]


def _together(spec: Piece, siblings: int, values: Sequence[Mapping[str, Tensor]]) -> Tensor:
    def one(own: Mapping[str, Tensor]) -> Tensor:
        term = spec.penalty(Parameters(own), siblings)
        assert term is not None
        return term

    if len(values) == 1:
        return one(values[0])
    stacked = {name: torch.stack([own[name] for own in values]) for name in values[0]}
    terms: Tensor = torch.vmap(one)(stacked)
    return terms.sum()


def _values(part: Adapter) -> dict[str, Tensor]:
    """The values of a piece, whole and in the dtype of factors."""
    return {n: gathered(v).to(torch.promote_types(v.dtype, torch.float32)) for n, v in part.values().items()}


def _is_added(model: nn.Module) -> bool:
    attendants = [WATCH.attendant_of(layer) for layer in adapted_layers(model).values()]
    return any(attendant is not None and attendant.adds_penalty for attendant in attendants)


def _refuse(grad: Tensor) -> Tensor:
    raise TrainingError(
        "this loss holds adapterzoo.penalty(model), and attach adds its gradient too: it would count twice. "
        "Leave it out of the loss, or attach(..., add_penalty=False)"
    )
