"""How close is close: one table by dtype, and comparisons that end in a sentence."""

from typing import NamedTuple

import torch
from torch import Tensor

from adapterzoo.testing.failure import CheckFailedError, require


class Tolerance(NamedTuple):
    """Limits of relative errors.

    Args:
        value: of weights and outputs.
        gradient: of gradients.
        jitter: how far every number that goes into the truth is moved, to see what it may move in turn: a composition
            that magnifies round-off is not blamed for it.
        idle: how much of all the work of a backward adds to the size of a gradient, which may be zero by itself, as
            along a direction that a norm divides out.
        arithmetic: the dtype of sums and products that the truth is moved in, too.
    """

    value: float
    gradient: float
    jitter: float
    idle: float
    arithmetic: torch.dtype


TOLERANCES = {
    torch.float64: Tolerance(1e-9, 1e-9, 1e-12, 1.0, torch.float64),
    torch.float32: Tolerance(1e-4, 3e-4, 1e-5, 0.3, torch.float32),
    torch.bfloat16: Tolerance(3e-2, 6e-2, 1e-2, 0.1, torch.float32),
}
"""By the dtype of the weight. Errors are measured against the size of what is compared."""


def size(value: Tensor) -> float:
    """‖value‖, in float64."""
    return float(torch.linalg.vector_norm(value.detach().to(torch.float64)))


def differs(actual: Tensor, expected: Tensor, what: str, limit: float) -> None:
    """Raise a CheckFailedError if two tensors differ by more than a limit, or one is not finite.

    Args:
        actual: what a piece made.
        expected: what it should have made.
        what: the start of the sentence.
        limit: of ‖actual − expected‖.
    """
    require(actual.shape == expected.shape, f"{what} has the shape {list(actual.shape)}, not {list(expected.shape)}")
    require(bool(torch.isfinite(actual).all()), f"{what} is not finite")
    error = size(actual.detach().to(torch.float64) - expected.detach().to(torch.float64))
    if error > limit:
        raise CheckFailedError(f"{what} is off by {error:.3g} (limit {limit:.3g}; its size is {size(expected):.3g})")


def same_bits(actual: Tensor, expected: Tensor, sentence: str) -> None:
    """Raise a CheckFailedError with a sentence unless two tensors have equal values."""
    require(actual.shape == expected.shape and torch.equal(actual.detach(), expected.detach()), sentence)
