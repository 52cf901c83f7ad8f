"""PiSSA: LoRA on the principal part of the weight."""

from typing import ClassVar

from adapterzoo.methods.singular import SingularStart
from adapterzoo.registry import register


@register
class PiSSA(SingularStart):
    """Principal singular values and vectors adaptation: ΔW = s (B A − B₀ A₀), where s B₀ A₀ is W's best rank-r part.

    So W' = (W − s B₀ A₀) + s B A: the principal part of W trains, and the rest is frozen.

    Shapes:
        A: [r, in], √(S_r / s) V_rᵀ; B: [out, r], U_r √(S_r / s), of W's r largest singular values; buffers A0, B0: what
        A and B start at.

    Args:
        r: rank, 1 ≤ r ≤ min(out, in).
        alpha: numerator of the scale s = alpha / r; r if not given.
        dropout: probability of dropping an input element on the way into A and A0, in training; 0 ≤ dropout < 1.

    Raises:
        SpecError: a field has a value out of its range.

    Example:
        >>> import torch
        >>> from adapterzoo import AdaptedLinear, PiSSA
        >>> layer = AdaptedLinear(torch.nn.Linear(6, 4), PiSSA(r=2))
        >>> layer.effective_weight().equal(layer.weight)
        True

    Source:
        Meng et al., arXiv 2404.02948, eqs. 2 to 4.

    Deviations:
        The base keeps W, and the start is exact; the published code stores the residual W − s B₀ A₀ as another base.
        The function is the same without dropout; with it, ours drops on ΔW alone, so that training starts at W too.
        The decomposition is exact; PEFT also offers a randomised one.
    """

    smallest: ClassVar[bool] = False
