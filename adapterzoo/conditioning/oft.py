"""OFT: trained rotations of the inputs, in blocks."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adapterzoo.base import WeightShape
from adapterzoo.factored import FactoredWeight
from adapterzoo.pieces import Parameters, Promise, Role, Wrapper
from adapterzoo.registry import register
from adapterzoo.site import Site
from adapterzoo.terms import Blocks
from adapterzoo.wide import wide


@register
class OFT(Wrapper):
    """Orthogonal fine-tuning: W' = W_inner Rᵀ with R = blockdiag(R_1, ..., R_n), R_k = (I + Q_k)(I − Q_k)⁻¹, Q_k skew.

    Neighbouring inputs are rotated in blocks. Row norms, angles between rows and singular values are kept. Around a
    `Frozen()` it is the method of the paper; around another generator that one's update is rotated along.

    Shapes:
        skew: [in / block_size, block_size (block_size − 1) / 2], the upper triangles of the Q_k, zero.

    Args:
        inner: the generator or wrapper whose weight is rotated.
        block_size: the size of a block, a divisor of in; 1 rotates nothing.

    Raises:
        SpecError: block_size is no whole number ≥ 1.

    Example:
        >>> from adapterzoo import OFT, Frozen
        >>> OFT(Frozen(), block_size=8)
        OFT(Frozen(), block_size=8)

    Source:
        Qiu et al., arXiv 2306.07280: a block-diagonal Cayley rotation; on the inputs as in PEFT's OFT.

    Deviations:
        The inverse is exact; PEFT takes five terms of its series by default. No constraint on ‖Q‖ (COFT), no dropout
        of blocks, and no block is shared.
    """

    roles: ClassVar[Mapping[str, Role]] = {"skew": Role.ROTATION}

    always_shown: ClassVar[frozenset[str]] = frozenset({"block_size"})

    block_size: int = Field(default=32, ge=1, description="a whole number ≥ 1")

    def misfit(self, shape: WeightShape) -> str | None:
        """block_size divides in."""
        width = shape.in_features
        if width % self.block_size == 0:
            return None
        near = min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: abs(d - self.block_size))
        return f"block_size={self.block_size} does not divide in = {width}; {near} does"

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """Zero: no rotation."""
        size = self.block_size
        return {"skew": site.zeros(site.in_features // size, size * (size - 1) // 2)}

    def condition(self, inner: FactoredWeight, params: Parameters, site: Site) -> FactoredWeight:
        """W_inner (I + E) with E = Rᵀ − I = −2 (I + Q)⁻¹ Q, exactly zero at the start."""
        Q = wide(_skew(params.skew, self.block_size))
        # There always is an inverse: Q has imaginary eigenvalues. `inv` would stop a GPU to ask whether there is.
        inverse = torch.linalg.inv_ex(torch.eye(self.block_size, dtype=Q.dtype, device=Q.device) + Q).inverse
        return inner.turn(Blocks((-2 * inverse @ Q).to(params.skew.dtype), orthogonal=True))

    def dense(self, inner: Tensor, params: Parameters, site: Site) -> Tensor:
        """W_inner Rᵀ."""
        identity = torch.eye(self.block_size, dtype=inner.dtype, device=inner.device)
        blocks = zip(inner.split(self.block_size, dim=1), _skew(params.skew, self.block_size), strict=True)  # type: ignore[no-untyped-call]
        return torch.cat(
            [part @ torch.linalg.solve(identity - Q, identity + Q, left=False).mT for part, Q in blocks], 1
        )

    def promises(self, inner: Tensor, weight: Tensor, params: Parameters, site: Site) -> Mapping[str, Promise]:
        """Lengths of rows and the angles between them are those of the inside."""
        return {"W' W'ᵀ = W_inner W_innerᵀ": (weight @ weight.mT, inner @ inner.mT)}


def _skew(upper: Tensor, size: int) -> Tensor:
    """The skew matrices with these upper triangles: [n, size (size − 1) / 2] -> [n, size, size]."""
    if size == 1:
        return upper.new_zeros(len(upper), 1, 1)
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    places = torch.zeros(size, size, dtype=torch.long, device=upper.device)
    places[rows, columns] = torch.arange(len(rows), device=upper.device)
    full = upper[:, places].triu(1)
    return full - full.mT
