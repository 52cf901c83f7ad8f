"""AdaLoRA: an update in the form of a singular value decomposition, whose triplets can be masked."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from adapterzoo.factored import FactoredWeight
from adapterzoo.methods.scaled import RankScaled
from adapterzoo.pieces import Parameters, Role, Site
from adapterzoo.registry import register


@register
class AdaLoRA(RankScaled):
    """Adaptive low-rank adaptation, SVD form: ΔW = s · P diag(λ ∘ mask) Q with s = alpha / r.

    Shapes:
        P: [out, r], N(0, 0.02²); lam (λ): [r], zero; Q: [r, in], N(0, 0.02²); buffer mask: [r], one.

    Args:
        r: rank at the start, 1 ≤ r ≤ min(out, in); the scale keeps dividing by it when triplets are masked.
        alpha: numerator of the scale; r if not given.
        dropout: probability of dropping an input element on the way into Q, in training; 0 ≤ dropout < 1.

    Raises:
        SpecError: a field has a value out of its range.

    Example:
        >>> import torch
        >>> from adapterzoo import AdaLoRA, AdaptedLinear
        >>> layer = AdaptedLinear(torch.nn.Linear(6, 4), AdaLoRA(r=3))
        >>> sorted(layer.adapter.state_dict())
        ['P', 'Q', 'lam', 'mask']

    Source:
        Zhang et al., arXiv 2303.10512, eq. 3.

    Deviations:
        The scale is alpha / r; the published code divides by r + 1e-5. The budget schedule is not part of this piece
        yet: without one the mask stays at one and the rank is fixed.
    """

    roles: ClassVar[Mapping[str, Role]] = {
        "P": Role.OUTPUT_FACTOR,
        "lam": Role.CORE,
        "Q": Role.INPUT_FACTOR,
        "mask": Role.BUFFER,
    }

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """P and Q small and random, λ zero: the update starts at zero."""
        return {
            "P": site.normal("P", site.out_features, self.r, std=0.02),
            "lam": site.zeros(self.r),
            "Q": site.normal("Q", self.r, site.in_features, std=0.02),
            "mask": site.ones(self.r),
        }

    def update(self, params: Parameters, site: Site) -> FactoredWeight:
        """U = P diag(s λ ∘ mask), V = Q."""
        return site.low_rank(params.P * (self.scale * params.lam * params.mask), params.Q, dropout=self.dropout)
