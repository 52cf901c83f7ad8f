"""The one kernel that every adapted linear layer runs through."""

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterzoo.base import Base


def factored_linear(
    x: Tensor,
    base: Base,
    delta: Tensor | None = None,
    U: Tensor | None = None,
    V: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    remainder: Tensor | None = None,
    dropout: float = 0.0,
    drop_rows: int = 0,
) -> Tensor:
    """Apply an adapted weight in its normal form, without forming it.

        y = x Wᵀ + δ∘(x Wᵀ) + (x Vᵀ) Uᵀ + x Dᵀ + bias

    The first `drop_rows` rows of V see dropout(x), everything else sees x. The sum is formed in at least float32 and
    rounded once, to the dtype of x Wᵀ (the autocast dtype under autocast). Without δ the base product takes the bias
    along, so that a zero update gives the very bits of the base layer.

    Shapes:
        x: [..., in]; W: [out, in]; delta: [out] or [1]; bias: [out]; U: [out, R]; V: [R, in]; remainder: [out, in];
        result: [..., out].

    Args:
        x: input.
        base: the frozen weight W.
        delta: δ.
        U: left factor of the update.
        V: right factor of the update.
        bias: the layer's own bias: added once, never scaled or rotated.
        remainder: D.
        dropout: probability of dropping an input element on the way into the first rows of V; 0 in evaluation.
        drop_rows: how many rows of V that concerns.

    Returns:
        y.

    Source:
        The normal form of docs/algebra.md; dropout as in LoRA (arXiv 2106.09685), on the update's input alone.

    Deviations:
        PEFT's DoRA also drops inside the base term; here the base term never sees dropout.
    """
    z = base.apply(x, bias if delta is None else None)
    if delta is None and U is None and remainder is None:
        return z
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(z.dtype)
        y = z.to(torch.promote_types(z.dtype, torch.float32))
        if delta is not None:  # not from a product that holds the bias: a large gain would magnify the bias's round-off
            y = torch.addcmul(y, y, delta.to(y.dtype))
        if U is not None and V is not None:
            h = _project(x, V.to(z.dtype), dropout, drop_rows)
            y = y + F.linear(h.to(y.dtype), U.to(y.dtype))
        if remainder is not None:
            y = y + F.linear(x, remainder.to(z.dtype)).to(y.dtype)
        if delta is not None and bias is not None:
            y = y + bias.to(y.dtype)
        return y.to(z.dtype)


def _project(x: Tensor, V: Tensor, dropout: float, drop_rows: int) -> Tensor:
    """X Vᵀ: [..., R], the first `drop_rows` columns from dropout(x)."""
    if dropout == 0.0 or drop_rows == 0:
        return F.linear(x, V)
    dropped = F.linear(F.dropout(x, dropout), V[:drop_rows])
    return torch.cat([dropped, F.linear(x, V[drop_rows:])], dim=-1) if drop_rows < len(V) else dropped
