"""What a weight may hold beside thin factors: maps of its inputs, and updates with a structure of their own."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from torch import Tensor

from adapterzoo.base import Base, WeightShape
from adapterzoo.wide import row_norms_sq, squared_rows, wide


class InputMap(ABC):
    """A square map R = I + M of the inputs, on the right of a weight: W R. M is carried, so that M = 0 changes nothing.

    Shapes:
        rows and inputs: [..., in].
    """

    @property
    @abstractmethod
    def keeps_lengths(self) -> bool:
        """Whether R is orthogonal, so that rows keep their lengths."""

    @abstractmethod
    def change_of_rows(self, rows: Tensor) -> Tensor:
        """Rows M: what W → W R adds to rows of W."""

    @abstractmethod
    def change_of_inputs(self, x: Tensor) -> Tensor:
        """X Mᵀ: what R adds to inputs on their way to W."""

    def of_rows(self, rows: Tensor) -> Tensor:
        """Rows R."""
        return rows + self.change_of_rows(rows)

    def of_inputs(self, x: Tensor) -> Tensor:
        """X Rᵀ, so that x (W R)ᵀ = (x Rᵀ) Wᵀ."""
        return x + self.change_of_inputs(x)

    def then(self, later: "InputMap") -> "InputMap":
        """R R_later: this one stands next to W."""
        return Chain(self, later)

    def row_norms_sq(self, base: Base) -> Tensor:
        """‖(W R)_i‖²: [out], in float64."""
        return base.row_norms_sq() if self.keeps_lengths else row_norms_sq(self.of_rows(base.dense()))


@dataclass(frozen=True, eq=False)
class Columns(InputMap):
    """R = diag(1 + γ): every column of W times its own gain.

    Args:
        shift: γ: [in].
    """

    shift: Tensor

    @property
    def keeps_lengths(self) -> bool:
        """False."""
        return False

    def change_of_rows(self, rows: Tensor) -> Tensor:
        """Rows diag(γ)."""
        return rows * self.shift

    def change_of_inputs(self, x: Tensor) -> Tensor:
        """γ ∘ x, in the dtype of x."""
        return x * self.shift.to(x.dtype)

    def then(self, later: InputMap) -> InputMap:
        """Two diagonals are one: (1 + γ)(1 + γ') = 1 + (γ + γ' + γ γ')."""
        if isinstance(later, Columns):
            return Columns(self.shift + later.shift + self.shift * later.shift)
        return super().then(later)

    def row_norms_sq(self, base: Base) -> Tensor:
        """‖w_i‖² + Σ_j W_ij² γ_j (2 + γ_j)."""
        shift = wide(self.shift)
        return base.row_norms_sq() + squared_rows(base.dense(), shift * (2 + shift))


@dataclass(frozen=True, eq=False)
class Blocks(InputMap):
    """R = I + blockdiag(E): neighbouring inputs are mixed in blocks of one size.

    Args:
        change: E: [blocks, size, size], with blocks · size = in.
        orthogonal: whether I + E is, block by block.
    """

    change: Tensor
    orthogonal: bool = False

    @property
    def keeps_lengths(self) -> bool:
        """Whether every block is orthogonal."""
        return self.orthogonal

    def change_of_rows(self, rows: Tensor) -> Tensor:
        """Rows blockdiag(E)."""
        return self._mixed(rows.to(self.change.dtype), self.change)

    def change_of_inputs(self, x: Tensor) -> Tensor:
        """X blockdiag(E)ᵀ, in the dtype of x."""
        return self._mixed(x, self.change.mT.to(x.dtype)).to(x.dtype)

    def _mixed(self, x: Tensor, blocks: Tensor) -> Tensor:
        parts = rearrange(x, "... (n i) -> ... n i", n=len(blocks))
        return rearrange(einsum(parts, blocks, "... n i, n i j -> ... n j"), "... n j -> ... (n j)")


@dataclass(frozen=True, eq=False)
class Chain(InputMap):
    """R = R_first R_second, with R − I = M_first R_second + M_second: no difference is taken.

    Args:
        first: the one next to W.
        second: the one that inputs meet first.
    """

    first: InputMap
    second: InputMap

    @property
    def keeps_lengths(self) -> bool:
        """Whether both do."""
        return self.first.keeps_lengths and self.second.keeps_lengths

    def change_of_rows(self, rows: Tensor) -> Tensor:
        """(rows M_first) R_second + rows M_second."""
        return self.second.of_rows(self.first.change_of_rows(rows)) + self.second.change_of_rows(rows)

    def change_of_inputs(self, x: Tensor) -> Tensor:
        """(x R_secondᵀ) M_firstᵀ + x M_secondᵀ."""
        change = self.second.change_of_inputs(x)
        return self.first.change_of_inputs(x + change) + change


@dataclass(frozen=True, eq=False)
class Turn:
    """A base term diag(gain) W (R − I) of a weight.

    Args:
        map: R.
        gain: [out] or [1]; None: the gain 1 + δ of the base itself, so that both are one product diag(1 + δ) W R.
    """

    map: InputMap
    gain: Tensor | None = None


class TurnedBase:
    """W R as a base of its own, through the same calls.

    Args:
        base: W.
        map: R.
    """

    def __init__(self, base: Base, map: InputMap) -> None:
        self._base, self._map = base, map

    @property
    def shape(self) -> WeightShape:
        """(out, in), and the kernel."""
        return self._base.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W."""
        return self._base.dtype

    @property
    def device(self) -> torch.device:
        """Where W lives."""
        return self._base.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of W."""
        return self._base.tensors

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X (W R)ᵀ + bias: [..., in] -> [..., out]."""
        return self._base.apply(self._map.of_inputs(x), bias)

    def apply_t(self, y: Tensor) -> Tensor:
        """Y W R: [..., out] -> [..., in]."""
        return self._map.of_rows(self._base.apply_t(y))

    def row_norms_sq(self) -> Tensor:
        """‖(W R)_i‖²: [out], in float64."""
        return self._map.row_norms_sq(self._base)

    def column_norms_sq(self) -> Tensor:
        """The squares of the columns of W R: [in], in float64."""
        return row_norms_sq(self.dense().mT)

    def dense(self) -> Tensor:
        """W R: [out, in]."""
        return self._map.of_rows(self._base.dense())


class Kronecker:
    """An update L ⊗ R, with L: [a, c] and R: [b, d]: a matrix [a b, c d] that is never formed to be applied.

    Args:
        left: L.
        right: R.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right

    @property
    def shape(self) -> tuple[int, int]:
        """(a b, c d)."""
        return self.left.shape[0] * self.right.shape[0], self.left.shape[1] * self.right.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        """X (L ⊗ R)ᵀ: [..., c d] -> [..., a b], by L X_t Rᵀ of every x_t as a matrix [c, d]."""
        return self._both_sides(x, self.left.to(x.dtype), self.right.to(x.dtype))

    def apply_t(self, y: Tensor) -> Tensor:
        """Y (L ⊗ R): [..., a b] -> [..., c d]."""
        return self._both_sides(y, self.left.mT.to(y.dtype), self.right.mT.to(y.dtype))

    def dense(self) -> Tensor:
        """L ⊗ R: [a b, c d]."""
        return torch.kron(self.left.contiguous(), self.right.contiguous())

    def row_norms_sq(self) -> Tensor:
        """The squares of its rows: [a b], in float64: products of those of L and R."""
        left, right = (wide(factor).square().sum(dim=1) for factor in (self.left, self.right))
        return torch.outer(left, right).flatten()

    @staticmethod
    def _both_sides(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        matrices = rearrange(x, "... (c d) -> ... c d", c=left.shape[1])
        return rearrange(left @ (matrices @ right.mT), "... a b -> ... (a b)")


@dataclass(frozen=True, eq=False)
class Structured:
    """A structured update with a gain for its rows: diag(gain) S.

    Args:
        update: S.
        gain: [out] or [1]; None is one.
    """

    update: Kronecker
    gain: Tensor | None = None

    def scaled(self, gain: Tensor) -> "Structured":
        """diag(gain) of it."""
        return Structured(self.update, gain if self.gain is None else gain * self.gain)

    def apply(self, x: Tensor) -> Tensor:
        """X Sᵀ diag(gain): [..., in] -> [..., out], in the dtype of x before the gain."""
        y = self.update.apply(x)
        return y if self.gain is None else y * self.gain

    def apply_t(self, y: Tensor) -> Tensor:
        """Y diag(gain) S: [..., out] -> [..., in]."""
        return self.update.apply_t(y if self.gain is None else y * self.gain)

    def dense(self) -> Tensor:
        """diag(gain) S: [out, in]."""
        matrix = self.update.dense()
        return matrix if self.gain is None else matrix * self.gain[:, None]
