"""SORA: a trained rotation of the output space, from a thin skew matrix."""

from collections.abc import Mapping
from functools import reduce
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adapterzoo.base import WeightShape
from adapterzoo.conditioning.rotations import cayley_middle, exp_middle
from adapterzoo.factored import FactoredWeight
from adapterzoo.pieces import Parameters, Promise, Role, Wrapper
from adapterzoo.registry import register
from adapterzoo.site import Site
from adapterzoo.wide import wide_product

Map = Literal["cayley", "exp", "first_order"]


@register
class SORA(Wrapper):
    """Rotation of the adapted weight: W' = R W_inner, R orthogonal, from the skew P = D Cᵀ − C Dᵀ of rank ≤ 2 rank.

    cayley: R = (I − P/2)⁻¹ (I + P/2).  exp: R = exp(P).  first_order: R = I + P, which is no rotation: it stretches
    (singular values √(1 + p²)) and is kept for parity with the published code.

    `cayley` and `exp` keep ‖W_inner‖_F, its column norms and its singular values.

    Shapes:
        C: [out, rank], kaiming uniform (a = √5) over out; D: [out, rank], a copy of C, so that P = 0.

    Args:
        inner: the generator or wrapper whose weight is rotated.
        rank: 1 ≤ rank ≤ out. One output (out = 1) has nothing to rotate.
        map: from the skew matrix to R.
        damping: multiply P by min(1, damping / (‖C‖_F + ‖D‖_F + 1e-6)), with its gradient; None does not.

    Raises:
        SpecError: a field has a value out of its range.

    Example:
        >>> from adapterzoo import LoRA, PreDiag, SORA
        >>> SORA(PreDiag(LoRA(r=8)), rank=2)
        SORA(PreDiag(LoRA(r=8)), rank=2)

    Source:
        arXiv 2511.00051 (SORA) names the rotation and its first-order form; Cayley transform and exponential of a thin
        skew matrix: docs/algebra.md.

    Deviations:
        The rotation alone: the diagonal is PreDiag's, and `PublishedSORA` composes both. The published merge leaves out
        the identity of I + P, and its forward scales and rotates the bias.
    """

    roles: ClassVar[Mapping[str, Role]] = {"C": Role.ROTATION, "D": Role.ROTATION}

    always_shown: ClassVar[frozenset[str]] = frozenset({"rank"})

    rank: int = Field(default=4, ge=1, description="a whole number ≥ 1")
    map: Map = Field(default="cayley", description="'cayley', 'exp' or 'first_order'")
    damping: float | None = Field(default=None, gt=0, description="a finite number > 0, or None")

    def misfit(self, shape: WeightShape) -> str | None:
        """1 ≤ rank ≤ out."""
        out = shape.out_features
        return f"rank={self.rank} is above out = {out}" if self.rank > out else None

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """C random, D = C: no rotation, with a gradient that is not zero."""
        start = site.kaiming_uniform("C", site.out_features, self.rank, fan=site.out_features)
        return {"C": start, "D": start.clone()}

    def condition(self, inner: FactoredWeight, params: Parameters, site: Site) -> FactoredWeight:
        """R = I + X Y with thin X and Y; U ← [U + X (Y U), X], V ← [V; Y (diag(1 + δ) W)]."""
        X, Y = self._thin_rotation(params.C, params.D)
        return inner.rotate(X, Y)

    # Note [P is built from E = D − C]
    # P = D Cᵀ − C Dᵀ = E Cᵀ − C Eᵀ = X₀ Y₀ with X₀ = [E, −C] and Y₀ = [C, E]ᵀ. The second form is exactly zero at the
    # start and free of cancellation near it, where the first loses its digits (docs/algebra.md measures both). A
    # function of X₀ Y₀ is I + X₀ φ(Y₀ X₀) Y₀, so all the work is on a 2 rank × 2 rank matrix.
    def _thin_rotation(self, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
        """X: [out, 2 rank] and Y: [2 rank, out] with R = I + X Y."""
        E = D - C
        if self.damping is not None:
            size = torch.linalg.vector_norm(C) + torch.linalg.vector_norm(D) + 1e-6
            E = E * (self.damping / size).clamp(max=1.0)
        left, right = torch.cat([E, -C], dim=1), torch.cat([C, E], dim=1).mT
        if self.map == "first_order":
            return left, right
        small = wide_product(right, left)
        middle = cayley_middle(small) if self.map == "cayley" else exp_middle(small)
        return wide_product(left, middle).to(C.dtype), right

    def dense(self, inner: Tensor, params: Parameters, site: Site) -> Tensor:
        """R W_inner, with the whole skew matrix P and the whole R: [out, out]."""
        C, E = params.C, params.D - params.C
        if self.damping is not None:
            E = E * torch.clamp(self.damping / (C.norm() + params.D.norm() + 1e-6), max=1)
        P, one = E @ C.mT - C @ E.mT, torch.eye(len(C), dtype=C.dtype, device=C.device)
        if self.map == "cayley":
            turn: Tensor = torch.linalg.solve(one - P / 2, one + P / 2)
            return turn @ inner
        turn = one + P
        if self.map == "exp":  # its series: torch's matrix_exp is off by 1e-10
            turn = reduce(lambda rest, n: one + P @ rest / n, range(60, 0, -1), one)
        return turn @ inner

    def promises(self, inner: Tensor, weight: Tensor, params: Parameters, site: Site) -> Mapping[str, Promise]:
        """A rotation keeps lengths."""
        if self.map == "first_order":
            return {}
        values = torch.linalg.svdvals(weight), torch.linalg.svdvals(inner)
        return {"singular values are kept": values, "column norms are kept": (weight.norm(dim=0), inner.norm(dim=0))}
