"""The one function that every adapted linear layer runs through."""

import torch
from torch import Tensor

from adapterzoo.base import Base
from adapterzoo.kernel import Dropout, FactoredLinear, Operands, forward
from adapterzoo.wide import in_transform


def factored_linear(
    x: Tensor,
    base: Base,
    delta: Tensor | None = None,
    U: Tensor | None = None,
    V: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    remainder: Tensor | None = None,
    turned: Tensor | None = None,
    dropout: float = 0.0,
    drop_rows: int = 0,
    lean: bool = False,
) -> Tensor:
    """Apply an adapted weight in its normal form, without forming it.

        y = x Wᵀ + δ∘(x Wᵀ) + (x Vᵀ) Uᵀ + x Dᵀ + bias

    The first `drop_rows` rows of V see dropout(x), everything else sees x. The sum is formed in at least float32 and
    rounded once, to the dtype of x Wᵀ (the autocast dtype under autocast). Without δ the base product takes the bias
    along, so that a zero update gives the very bits of the base layer.

    Beside its arguments the backward keeps x Vᵀ, and x Wᵀ where a δ: [out] trains (y in its place if `lean`):

        ∂x = (∂y∘(1 + δ)) W + (∂y U) V + ∂y D    ∂U = ∂yᵀ (x Vᵀ)    ∂V = (∂y U)ᵀ x    ∂D = ∂yᵀ x
        ∂δ_i = Σ_t ∂y_ti (x Wᵀ)_ti, and for δ: [1] their sum ⟨∂y W, x⟩, which needs no x Wᵀ

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
        turned: what W sees in the place of x, as x Rᵀ of a map of inputs; [..., in].
        dropout: probability of dropping an input element on the way into the first rows of V; 0 in evaluation.
        drop_rows: how many rows of V that concerns.
        lean: keep y, which the next operation often keeps anyway, and not x Wᵀ; then y must not be changed in place.
            No effect under torch.compile, which decides by itself what to keep.

    Returns:
        y.

    Source:
        The normal form and its gradients: docs/algebra.md; dropout as in LoRA (arXiv 2106.09685), on the update's input
        alone.

    Deviations:
        PEFT's DoRA also drops inside the base term; here the base term never sees dropout.
    """
    drop = Dropout.draw(x, dropout, drop_rows) if dropout and drop_rows and U is not None else None
    operands = Operands(x, delta, U, V, bias, remainder, turned)
    if not (torch.is_grad_enabled() or in_transform()):
        return forward(base, operands, drop, in_place=not torch.compiler.is_compiling()).y
    base_trains = any(tensor.requires_grad for tensor in base.tensors)
    if operands.update_trains and not (in_transform() or base_trains):
        drawn = (0.0, 0, None) if drop is None else drop
        return FactoredLinear.apply(base, lean, *drawn, *operands)  # type: ignore[no-any-return, no-untyped-call]
    return forward(base, operands, drop, in_place=False).y  # a frozen update keeps nothing for the backward, not even x
