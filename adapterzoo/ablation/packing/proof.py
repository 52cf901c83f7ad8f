"""A pack proves itself: losses and gradients of a packed step against those of each run by itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adapterzoo.ablation.packing.trees import UnpackableError

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
"""How far a loss may be from the same loss apart: relative to the larger of it and 1. Gradients: ten times that."""
_NARROW = 2e-2  # of losses in 16 bits
_SMALL = 1e-2  # a parameter whose gradient is below this share of the run's may be off by its share of that

Gradients = Sequence[Tensor | None]


def check_loss(packed: float, apart: float, dtype: torch.dtype) -> None:
    """Compare one run's loss.

    Raises:
        UnpackableError: it differs by more than the tolerance.
    """
    off, allowed = abs(packed - apart), TOLERANCES.get(dtype, _NARROW) * max(1.0, abs(apart))
    if not off <= allowed:
        raise UnpackableError(
            f"a packed loss is {packed:.9g}, and apart it is {apart:.9g}: the model may mix the examples of a batch"
        )


def check_gradients(packed: Gradients, apart: Gradients, dtype: torch.dtype) -> None:
    """Compare one run's gradients, parameter by parameter.

    Raises:
        UnpackableError: one differs by more than the tolerance.
    """
    allowed = 10 * TOLERANCES.get(dtype, _NARROW)
    whole = torch.stack([_norm(grad) for grad in apart]).norm() if apart else torch.zeros(())
    if not whole.isfinite():
        return
    for own, reference in zip(packed, apart, strict=True):
        off = _norm(reference) if own is None else _norm(own if reference is None else own - reference)
        if not off <= allowed * (_norm(reference) + _SMALL * whole):
            raise UnpackableError(
                f"a packed gradient is off by {float(off):.3g}, of {float(_norm(reference)):.3g}: "
                "the first axis of some input may not be the batch"
            )


@contextmanager
def drawing_nothing(device: torch.device) -> Iterator[None]:
    """Leave torch's global generators as they were.

    Raises:
        UnpackableError: what runs inside has drawn from them, as dropout does: packed, it would draw other numbers.
    """
    before = _states(device)
    try:
        yield
    finally:
        drew = any(not a.equal(b) for a, b in zip(before, _states(device), strict=True))
        if drew:
            torch.set_rng_state(before[0])
            if len(before) > 1:
                torch.cuda.set_rng_state(before[1], device)
    if drew:
        raise UnpackableError("its forward draws random numbers, such as dropout's, which each run has of its own")


@contextmanager
def changing_nothing(models: Sequence[nn.Module]) -> Iterator[None]:
    """Leave the buffers of models as they were: several runs would share one, and a proof would change it twice.

    Raises:
        UnpackableError: what runs inside has changed one, as norms over a batch do.
    """
    before = [(name, buffer, buffer.clone()) for model in models for name, buffer in model.named_buffers()]
    changed = ""
    try:
        yield
    finally:
        for name, buffer, value in before:
            if not torch.equal(buffer, value):
                changed = changed or name
                buffer.copy_(value)
    if changed:
        raise UnpackableError(f"its forward changes {changed}, which each run has of its own")


def _states(device: torch.device) -> Sequence[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _norm(grad: Tensor | None) -> Tensor:
    return (
        torch.zeros((), dtype=torch.float64) if grad is None else torch.linalg.vector_norm(grad.detach()).double().cpu()
    )
