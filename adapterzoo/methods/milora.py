"""MiLoRA: LoRA on the minor part of the weight."""

from typing import ClassVar

from adapterzoo.methods.singular import SingularStart
from adapterzoo.registry import register


@register
class MiLoRA(SingularStart):
    """Minor singular component adaptation: ΔW = s (B A − B₀ A₀), where s B₀ A₀ is W's part of smallest singular values.

    So W' = (W − s B₀ A₀) + s B A: the minor part of W trains, and the principal part is frozen.

    Shapes:
        A: [r, in], √(S_r / s) V_rᵀ; B: [out, r], U_r √(S_r / s), of W's r smallest singular values; buffers A0, B0:
        what A and B start at.

    Args:
        r: rank, 1 ≤ r ≤ min(out, in).
        alpha: numerator of the scale s = alpha / r; r if not given.
        dropout: probability of dropping an input element on the way into A and A0, in training; 0 ≤ dropout < 1.

    Raises:
        SpecError: a field has a value out of its range.

    Example:
        >>> import torch
        >>> from adapterzoo import AdaptedLinear, MiLoRA
        >>> layer = AdaptedLinear(torch.nn.Linear(6, 4), MiLoRA(r=2))
        >>> layer.effective_weight().equal(layer.weight)
        True

    Source:
        Wang et al., arXiv 2406.09044; the start as in its published code (svd_init.py, mode "min").

    Deviations:
        The base keeps W, and the start is exact; the published code stores the residual as another base. The function
        is the same without dropout; with it, ours drops on ΔW alone.
    """

    smallest: ClassVar[bool] = True
