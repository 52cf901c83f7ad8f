"""The normal form that every composition of generators and wrappers has, and its norms without the matrix."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterzoo.base import Base
from adapterzoo.wide import row_norms_sq, row_squares, safe_sqrt, wide


class RightFactor:
    """The thin factor V: [R, in] of an update U V, with the two products that norms are made of, each formed once.

    Args:
        base: the weight under the adapter.
        value: V: [R, in].
        steps: on a convolution, the first rows of V as a kernel [r, k, *kernel] after a map of the channels
            [k, in/groups]: what they are the product of.
    """

    def __init__(self, base: Base, value: Tensor, steps: tuple[Tensor, Tensor] | None = None) -> None:
        self.base = base
        self.value = value
        self.steps = steps
        self._projected: Tensor | None = None
        self._gram: Tensor | None = None

    # Note [A shared product keeps its graph]
    # A wrapper may ask for a product under no_grad. Handing that graphless tensor to the next wrapper would lose
    # gradients without a sign, so a kept product is used again only where it carries all the graph that is wanted.
    def _lacks_graph(self, product: Tensor) -> bool:
        wanted = self.value.requires_grad or any(tensor.requires_grad for tensor in self.base.tensors)
        return torch.is_grad_enabled() and wanted and not product.requires_grad

    @property
    def projected(self) -> Tensor:
        """W Vᵀ: [out, R]: what U is multiplied with in ⟨w_i, (U V)_i⟩; costs as much as R more tokens."""
        if self._projected is None or self._lacks_graph(self._projected):
            self._projected = self.base.apply(self.value).mT
        return self._projected

    @property
    def gram(self) -> Tensor:
        """V Vᵀ: [R, R], in float64, without a graph."""
        if self._gram is None:
            rows = wide(self.value.detach())
            self._gram = rows @ rows.mT
        return self._gram

    def extended(self, rows: Tensor) -> "RightFactor":
        """[V; rows]: [R + n, in]. What is known of V's product with W is carried over."""
        longer = RightFactor(self.base, torch.cat([self.value, rows]), self.steps)
        if self._projected is not None and not self._lacks_graph(self._projected):
            longer._projected = torch.cat([self._projected, self.base.apply(rows).mT], dim=1)
        return longer


@dataclass(frozen=True, eq=False)
class FactoredWeight:
    """The normal form of an adapted weight.

        W' = W + diag(δ) W + U V + D

    Every generator makes one and every wrapper maps one to another, so forward, merge, norms and spectra of any
    composition follow from this one value. δ is carried, never 1 + δ: near the start the difference would be lost.
    What is absent is zero. D is dense, and only pieces without structure (Full) use it; norms then use the dense form.

    Shapes:
        delta: [out], or [1] where every row has the same; U: [out, R]; V: [R, in]; remainder: [out, in].

    Args:
        base: the frozen weight W, through its four calls.
        delta: δ, the per-row change of gain of the base weight.
        U: left factor.
        V: right factor.
        remainder: D.
        drop_rows: how many rows of V, from the first, are the generator's own and see dropped-out inputs in training;
            the rows that wrappers derive from W never do.
        dropout: their dropout probability.
    """

    base: Base
    delta: Tensor | None = None
    U: Tensor | None = None
    V: RightFactor | None = None
    remainder: Tensor | None = None
    drop_rows: int = 0
    dropout: float = 0.0

    # What a wrapper may do. Each operation is one closure rule of the algebra.

    def calibrate_base(self, shift: Tensor) -> "FactoredWeight":
        """W' + diag(shift) W: the base term alone is changed, before the update is added. shift: [out] or [1]."""
        return replace(self, delta=_add(shift, self.delta))

    def scale_rows(self, gain: Tensor) -> "FactoredWeight":
        """diag(gain) W': base and update alike. gain: [out] or [1]."""
        return self.mix(gain, gain)

    def mix(self, base_gain: Tensor, update_gain: Tensor) -> "FactoredWeight":
        """a∘W + b∘(W' − W): each gain [1] or [out], by rows.

        δ ← (a − 1) + b δ, U ← b U, D ← b D.
        """
        inner = None if self.delta is None else update_gain * self.delta
        column = update_gain[:, None]
        return replace(
            self,
            delta=_add(base_gain - 1, inner),
            U=None if self.U is None else column * self.U,
            remainder=None if self.remainder is None else column * self.remainder,
        )

    def rotate(self, X: Tensor, Y: Tensor) -> "FactoredWeight":
        """(I + X Y) W' with a thin X: [out, k] and Y: [k, out].

        U ← [U + X (Y U), X], V ← [V; Y (diag(1 + δ) W + D)].
        """
        rows = self.base.apply_t(Y if self.delta is None else Y + Y * self.delta)
        if self.remainder is not None:
            rows = rows + Y @ self.remainder
        if self.U is None or self.V is None:
            return replace(self, U=X, V=RightFactor(self.base, rows))
        return replace(self, U=torch.cat([self.U + X @ (Y @ self.U), X], dim=1), V=self.V.extended(rows))

    # What a wrapper may ask. Each closed form stands beside its dense definition.

    def row_norms(self, constant: bool = False) -> Tensor:
        """‖w'_i‖ of every row of W': [out], in the factors' dtype, with the subgradient 0 on a zero row.

        ‖w'_i‖² = l_i²‖w_i‖² + 2 l_i ⟨(W Vᵀ)_i, U_i⟩ + ⟨(U V Vᵀ)_i, U_i⟩ with l = 1 + δ, clamped at zero.

        Args:
            constant: without a gradient. The products that other norms may share have theirs all the same.
        """
        if constant:
            if self.V is not None and self.remainder is None:
                _ = self.V.projected
            with torch.no_grad():
                return self.row_norms().detach()  # no_grad alone does not stop forward-mode derivatives
        if self.remainder is not None:
            return safe_sqrt(row_norms_sq(self.dense())).to(self.remainder.dtype)
        squares = self.base.row_norms_sq()
        gain = squares.new_ones(1) if self.delta is None else 1 + wide(self.delta)
        return safe_sqrt(self._row_squares(squares, gain)).to(self._like().dtype)

    def update_norm(self) -> Tensor:
        """‖W' − W‖_F: [1], in float64, with the subgradient 0 at a zero update.

        ‖W' − W‖²_F = Σ δ_i²‖w_i‖² + 2 Σ δ_i ⟨(W Vᵀ)_i, U_i⟩ + tr((UᵀU)(V Vᵀ)), clamped at zero before the root.
        """
        return safe_sqrt(self._update_squares().sum(dim=0, keepdim=True))

    def update_row_norms(self) -> Tensor:
        """‖(W' − W)_i‖ of every row: [out], in float64, with the subgradient 0 on a zero row."""
        return safe_sqrt(self._update_squares())

    def _update_squares(self) -> Tensor:
        """‖(W' − W)_i‖²: [out], in float64."""
        if self.remainder is not None:
            return row_norms_sq(self.dense_update())
        gain = None if self.delta is None else wide(self.delta)
        return self._row_squares(self.base.row_norms_sq(), gain)

    def _row_squares(self, squares: Tensor, gain: Tensor | None) -> Tensor:
        """‖gain_i w_i + (U V)_i‖²: [out], in float64; no gain is 0."""
        if self.U is None or self.V is None:
            return torch.zeros_like(squares) if gain is None else gain.square() * squares
        projected = None if gain is None else self.V.projected
        return row_squares(squares, gain, projected, self.U, self.V.value, self.V.gram)

    def dense_update(self) -> Tensor:
        """W' − W as a matrix: [out, in], without subtracting: the definition of the normal form."""
        like = self._like()
        parts: list[Tensor] = []
        if self.delta is not None:
            parts.append(self.delta[:, None] * self.base.dense().to(like.dtype))
        if self.U is not None and self.V is not None:
            parts.append(self.U @ self.V.value)
        if self.remainder is not None:
            parts.append(self.remainder)
        return sum(parts[1:], start=parts[0]) if parts else torch.zeros_like(self.base.dense(), dtype=like.dtype)

    def dense(self) -> Tensor:
        """W' as a matrix: [out, in], in the factors' dtype."""
        update = self.dense_update()
        return self.base.dense().to(update.dtype) + update

    def _like(self) -> Tensor:
        """Any tensor in the factors' dtype; a generator sets one of them."""
        return next(tensor for tensor in (self.delta, self.U, self.remainder) if tensor is not None)


def _add(left: Tensor, right: Tensor | None) -> Tensor:
    return left if right is None else left + right
