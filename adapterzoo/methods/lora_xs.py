"""LoRA-XS: a small trained matrix between frozen singular vectors."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from adapterzoo.factored import FactoredWeight
from adapterzoo.methods.scaled import RankScaled
from adapterzoo.pieces import Parameters, Role
from adapterzoo.registry import register
from adapterzoo.site import Site


@register
class LoRAXS(RankScaled):
    """LoRA-XS: ΔW = s · B R A with B and A frozen, from W's r largest singular triplets; R alone trains.

    It does not start at W: R is small and random.

    Shapes:
        R: [r, r], N(0, 1e-5²); buffers B: [out, r], U_r diag(S_r); A: [r, in], V_rᵀ.

    Args:
        r: rank, 1 ≤ r ≤ min(out, in).
        alpha: numerator of the scale s = alpha / r; r if not given.
        dropout: probability of dropping an input element on the way into A, in training; 0 ≤ dropout < 1.

    Raises:
        SpecError: a field has a value out of its range.

    Example:
        >>> from adapterzoo import DoRA, LoRAXS
        >>> DoRA(LoRAXS(r=16))
        DoRA(LoRAXS(r=16))

    Source:
        Bałazy et al., arXiv 2405.17604, section 3.

    Deviations:
        The decomposition is exact; the published code takes a randomised one (10 iterations).
    """

    roles: ClassVar[Mapping[str, Role]] = {"R": Role.CORE, "A": Role.BUFFER, "B": Role.BUFFER}

    starts_neutral: ClassVar[bool] = False

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """B = U_r diag(S_r), A = V_rᵀ, R small and random."""
        U, S, Vt = site.singular_triplets(self.r)
        return {"R": site.normal("R", self.r, self.r, std=1e-5), "A": Vt, "B": U * S}

    def update(self, params: Parameters, site: Site) -> FactoredWeight:
        """U = s B R, V = A."""
        return site.low_rank(self.scale * params.B @ params.R, params.A, dropout=self.dropout)

    def dense(self, params: Parameters, site: Site) -> Tensor:
        """S B R A."""
        return self.scale * params.B @ (params.R @ params.A)
