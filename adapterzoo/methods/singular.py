"""What PiSSA and MiLoRA have in common: LoRA that starts at singular triplets of W, and adds only what has changed."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from adapterzoo.factored import FactoredWeight
from adapterzoo.methods.scaled import RankScaled
from adapterzoo.pieces import Parameters, Role
from adapterzoo.site import Site


class SingularStart(RankScaled):
    """ΔW = s (B A − B₀ A₀), with s B₀ A₀ a part of the singular value decomposition of W. Abstract.

    U = s [B − B₀, B₀] and V = [A; A − A₀], so no difference of products is formed, and the start is exact.
    """

    roles: ClassVar[Mapping[str, Role]] = {
        "A": Role.INPUT_FACTOR, "B": Role.OUTPUT_FACTOR, "A0": Role.BUFFER, "B0": Role.BUFFER,
    }  # fmt: skip

    smallest: ClassVar[bool]
    """Whether the part is that of the smallest singular values."""

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """A₀ = √(S/s) Vᵀ and B₀ = U √(S/s) of the chosen triplets; A and B are copies of them."""
        U, S, Vt = site.singular_triplets(self.r, smallest=self.smallest)
        root = (S / self.scale).sqrt()
        A, B = root[:, None] * Vt, U * root
        return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}

    def update(self, params: Parameters, site: Site) -> FactoredWeight:
        """U = s [B − B₀, B₀], V = [A; A − A₀]."""
        columns = self.scale * torch.cat([params.B - params.B0, params.B0], dim=1)
        rows = torch.cat([params.A, params.A - params.A0])
        return site.low_rank(columns, rows, dropout=self.dropout)

    def dense(self, params: Parameters, site: Site) -> Tensor:
        """S (B A − B₀ A₀)."""
        return self.scale * (params.B @ params.A - params.B0 @ params.A0)
