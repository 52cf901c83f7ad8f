"""MoSLoRA: LoRA with a trained mixer between its factors."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from adapterzoo.factored import FactoredWeight
from adapterzoo.methods.scaled import RankScaled
from adapterzoo.pieces import Parameters, Role
from adapterzoo.registry import register
from adapterzoo.site import Site


@register
class MoSLoRA(RankScaled):
    """Mixture of subspaces in low-rank adaptation: ΔW = s · B M A, all three trained.

    Shapes:
        A: [r, in], kaiming uniform (a = √5) as LoRA's; M: [r, r], kaiming uniform (a = √5); B: [out, r], zero.

    Args:
        r: rank, 1 ≤ r ≤ min(out, in).
        alpha: numerator of the scale s = alpha / r; r if not given.
        dropout: probability of dropping an input element on the way into A, in training; 0 ≤ dropout < 1.

    Raises:
        SpecError: a field has a value out of its range.

    Example:
        >>> from adapterzoo import MoSLoRA
        >>> MoSLoRA(r=4, alpha=8)
        MoSLoRA(r=4, alpha=8)

    Source:
        Wu et al., arXiv 2406.11909, the learnable mixer.

    Deviations:
        None known.
    """

    roles: ClassVar[Mapping[str, Role]] = {"A": Role.INPUT_FACTOR, "M": Role.CORE, "B": Role.OUTPUT_FACTOR}

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """A and M random, B zero: the update starts at zero."""
        return {
            "A": site.kaiming_uniform("A", self.r, site.in_features, fan=site.fan_in),
            "M": site.kaiming_uniform("M", self.r, self.r, fan=self.r),
            "B": site.zeros(site.out_features, self.r),
        }

    def update(self, params: Parameters, site: Site) -> FactoredWeight:
        """U = s B M, V = A."""
        return site.low_rank(self.scale * params.B @ params.M, params.A, dropout=self.dropout)

    def dense(self, params: Parameters, site: Site) -> Tensor:
        """S B M A."""
        return self.scale * params.B @ (params.M @ params.A)
