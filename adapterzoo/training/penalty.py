"""The penalties that pieces declare, summed over a model."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adapterzoo.adapter import Adapter
from adapterzoo.errors import TrainingError
from adapterzoo.layer import adapted_layers
from adapterzoo.pieces import Parameters
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
        0.71

    Source:
        AdaLoRA's orthogonality: Zhang et al., arXiv 2303.10512, eq. 4, in the form of its published code.
    """
    total = torch.zeros(())
    for part, siblings in penalised(model):
        term = term_of(part, siblings)
        total = total.to(term.device) + term
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
            if part.spec.penalty(_values(part), siblings[type(part.spec)]) is not None
        ]


def term_of(part: Adapter, siblings: int) -> Tensor:
    """The penalty of one piece that declares one: []."""
    with full_precision(next(iter(part.values().values())).device.type):
        term = part.spec.penalty(_values(part), siblings)
    assert term is not None
    return term


def gradient_of_term(
    part: Adapter, siblings: int, wanted: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The penalty of one piece, and its gradient by some of its parameters."""
    with torch.enable_grad(), full_precision(wanted[0].device.type):
        term = term_of(part, siblings)
        return term.detach(), torch.autograd.grad(term, list(wanted), allow_unused=True)


def _values(part: Adapter) -> Parameters:
    """The values of a piece, whole and in the dtype of factors."""
    return Parameters(
        {n: gathered(v).to(torch.promote_types(v.dtype, torch.float32)) for n, v in part.values().items()}
    )


def _is_added(model: nn.Module) -> bool:
    attendants = [WATCH.attendant_of(layer) for layer in adapted_layers(model).values()]
    return any(attendant is not None and attendant.adds_penalty for attendant in attendants)


def _refuse(grad: Tensor) -> Tensor:
    raise TrainingError(
        "this loss holds adapterzoo.penalty(model), and attach adds its gradient too: it would count twice. "
        "Leave it out of the loss, or attach(..., add_penalty=False)"
    )
