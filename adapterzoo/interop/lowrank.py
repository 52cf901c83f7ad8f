"""The best approximation of an update by a product of two thin factors, exact in float64."""

from typing import NamedTuple

import torch
from torch import Tensor

from adapterzoo.factored import FactoredWeight

ROUNDING = 2e-7
"""What factors in float32 add to a residual at most, relative to the update."""


class Triplets(NamedTuple):
    """Singular triplets of Δ = left diag(values) right, the largest first: [out, k], [k], [k, in], in float64."""

    left: Tensor
    values: Tensor
    right: Tensor

    def rank_for(self, bound: float) -> int:
        """The smallest rank, at least 1, whose factors leave at most bound · ‖Δ‖_F."""
        energy = self.values.square()
        tails = energy.flip(0).cumsum(0).flip(0)  # tails[i]: what a rank of i leaves
        allowed = (bound**2 - ROUNDING**2) * energy.sum()
        return max(1, int((tails > allowed).sum()))

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B: [out, rank] and A: [rank, in] in float32, the singular values split evenly; zeros beyond their number."""
        root = self.values[:rank].sqrt()
        B = (self.left[:, :rank] * root).float()
        A = (self.right[:rank] * root[:, None]).float()
        missing = rank - len(root)
        return torch.nn.functional.pad(B, (0, missing)), torch.nn.functional.pad(A, (0, 0, 0, missing))


class Update:
    """W' − W of a normal form in float64: thin where it can be, else dense.

    Without a gain of the base (δ) and a dense remainder the update is U V, of a rank of at most R, and everything is
    done on the two thin factors.

    Shapes:
        left: [out, R], right: [R, in]; dense: left [out, in], and no right.

    Args:
        weight: W' in normal form.
    """

    def __init__(self, weight: FactoredWeight) -> None:
        bulky = weight.delta is not None or weight.remainder is not None or weight.turns or weight.structured
        thin = not bulky and weight.U is not None and weight.V is not None
        self.right: Tensor | None = None
        if thin and weight.U is not None and weight.V is not None:
            self.left, self.right = _precise(weight.U), _precise(weight.V.value)
        else:
            self.left = _precise(weight.dense_update())

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    def is_finite(self) -> bool:
        """Whether all its numbers are finite."""
        return all(bool(part.isfinite().all()) for part in (self.left, self.right) if part is not None)

    def norm(self) -> float:
        """‖Δ‖_F."""
        return float(self.left.norm()) if self.right is None else _thin_norm(self.left, self.right)

    def distance(self, B: Tensor, A: Tensor) -> float:
        """‖Δ − B A‖_F, without the subtraction of two long numbers."""
        B, A = B.to(self.left), A.to(self.left)
        if self.right is None:
            return float((self.left - B @ A).norm())
        return _thin_norm(torch.cat([self.left, -B], dim=1), torch.cat([self.right, A]))

    def triplets(self) -> Triplets:
        """All singular triplets of Δ."""
        return _dense_triplets(self.left) if self.right is None else _thin_triplets(self.left, self.right)


def _precise(value: Tensor) -> Tensor:
    value = value.detach()
    return (value.cpu() if value.device.type == "mps" else value).double()  # MPS has no float64


def _thin_norm(left: Tensor, right: Tensor) -> float:
    """‖left right‖_F from two small triangles: traces of Gram matrices would lose half of the digits."""
    return float((torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT).norm())


def _thin_triplets(left: Tensor, right: Tensor) -> Triplets:
    Q, R = torch.linalg.qr(left)
    P, S = torch.linalg.qr(right.mT)
    inner_left, values, inner_right = torch.linalg.svd(R @ S.mT, full_matrices=False)
    return Triplets(Q @ inner_left, values, inner_right @ P.mT)


# Note [Dense updates by the smaller Gram matrix]
# torch.svd_lowrank is a random sketch: on the flat spectrum of diag(δ) W its residual is percents above the best one. A
# full SVD is exact, and takes two (square) to four times (1 × 2.7) as long as the eigenvectors of ΔΔᵀ. These cost no
# digits here: B A is the projection of Δ to the first eigenvectors, formed in float64 from Δ itself, so the singular
# values that a Gram matrix can't tell apart, those below 1e-8 of the largest, are only mixed among themselves.
def _dense_triplets(delta: Tensor) -> Triplets:
    if delta.shape[0] > delta.shape[1]:
        right, values, left = _dense_triplets(delta.mT)
        return Triplets(left.mT, values, right.mT)
    left = torch.linalg.eigh(delta @ delta.mT).eigenvectors.flip(1)
    rows = left.mT @ delta
    values = rows.norm(dim=1)
    return Triplets(left, values, rows / values.clamp_min(torch.finfo(values.dtype).tiny)[:, None])
