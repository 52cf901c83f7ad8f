"""LoRA: a low-rank update."""

import math
from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from adapterzoo.factored import FactoredWeight
from adapterzoo.methods.scaled import RankScaled
from adapterzoo.pieces import Parameters, Role
from adapterzoo.registry import register
from adapterzoo.site import Site


@register
class LoRA(RankScaled):
    """Low-rank adaptation: ΔW = s · B A with s = alpha / r, or alpha / √r for rank-stabilised LoRA.

    Shapes:
        A: [r, in], kaiming uniform (a = √5) over the inputs that add up in an output: all of them, or one for an
        embedding; B: [out, r], zero.

    Args:
        r: rank, 1 ≤ r ≤ min(out, in).
        alpha: numerator of the scale; r if not given.
        dropout: probability of dropping an input element on the way into A, in training; 0 ≤ dropout < 1.
        rslora: divide by √r instead of r.

    Raises:
        SpecError: a field has a value out of its range.

    Example:
        >>> from adapterzoo import LoRA
        >>> LoRA(r=4, alpha=8).scale
        2.0

    Source:
        Hu et al., arXiv 2106.09685, section 4.1; rank-stabilised: Kalajdzievski, arXiv 2312.03732.

    Deviations:
        None.
    """

    roles: ClassVar[Mapping[str, Role]] = {"A": Role.INPUT_FACTOR, "B": Role.OUTPUT_FACTOR}

    rslora: bool = Field(default=False, description="True or False")

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / √r if rslora."""
        return self.numerator / (math.sqrt(self.r) if self.rslora else self.r)

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """A from kaiming uniform, B zero: the update starts at zero."""
        return {
            "A": site.kaiming_uniform("A", self.r, site.in_features, fan=site.fan_in),
            "B": site.zeros(site.out_features, self.r),
        }

    def update(self, params: Parameters, site: Site) -> FactoredWeight:
        """U = s B, V = A."""
        columns = params.B if self.scale == 1 else self.scale * params.B
        return site.low_rank(columns, params.A, dropout=self.dropout)

    def dense(self, params: Parameters, site: Site) -> Tensor:
        """(alpha / r) B A, or (alpha / √r) B A."""
        divisor = self.r**0.5 if self.rslora else self.r
        return self.numerator / divisor * (params.B @ params.A)
