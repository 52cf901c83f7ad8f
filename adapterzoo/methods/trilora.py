"""TriLoRA: LoRA with trained singular values between its factors."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from adapterzoo.factored import FactoredWeight
from adapterzoo.methods.scaled import RankScaled
from adapterzoo.pieces import Parameters, Role
from adapterzoo.registry import register
from adapterzoo.site import Site


@register
class TriLoRA(RankScaled):
    """LoRA in three factors: ΔW = s · B diag(E) A. AdaLoRA's form, without its ranks, penalty and small start.

    Shapes:
        A: [r, in], kaiming uniform (a = √5) as LoRA's; E: [r], zero; B: [out, r], kaiming uniform (a = √5) over r.

    Args:
        r: rank, 1 ≤ r ≤ min(out, in).
        alpha: numerator of the scale s = alpha / r; r if not given.
        dropout: probability of dropping an input element on the way into A, in training; 0 ≤ dropout < 1.

    Raises:
        SpecError: a field has a value out of its range.

    Example:
        >>> from adapterzoo import TriLoRA
        >>> TriLoRA(r=4)
        TriLoRA(r=4)

    Source:
        Feng et al., arXiv 2405.11236 (TriLoRA), as public code reads it: docs/pieces/trilora.md. Unverified: the paper
        itself was not read.

    Deviations:
        Of two public codes one has the scale alpha / r and the other none; here it is alpha / r, one by default.
    """

    roles: ClassVar[Mapping[str, Role]] = {"A": Role.INPUT_FACTOR, "E": Role.CORE, "B": Role.OUTPUT_FACTOR}

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """A and B random, E zero: the update starts at zero."""
        return {
            "A": site.kaiming_uniform("A", self.r, site.in_features, fan=site.fan_in),
            "E": site.zeros(self.r),
            "B": site.kaiming_uniform("B", site.out_features, self.r, fan=self.r),
        }

    def update(self, params: Parameters, site: Site) -> FactoredWeight:
        """U = s B diag(E), V = A."""
        return site.low_rank(params.B * (self.scale * params.E), params.A, dropout=self.dropout)

    def dense(self, params: Parameters, site: Site) -> Tensor:
        """S B diag(E) A."""
        return self.scale * params.B @ params.E.diag() @ params.A
