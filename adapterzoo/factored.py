"""The normal form that every composition of generators and wrappers has, and its norms without the matrix."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterzoo.base import Base
from adapterzoo.errors import PieceError
from adapterzoo.terms import InputMap, Structured, Turn, TurnedBase
from adapterzoo.wide import column_norms_sq, row_norms_sq, row_squares, safe_sqrt, squared_columns, wide


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

        W' = W + diag(δ) W + U V  (+ Σ_k diag(g_k) W (R_k − I) + Σ_j diag(h_j) S_j + D)

    Every generator makes one and every wrapper maps one to another, so forward, merge, norms and spectra of any
    composition follow from this one value. δ is carried, never 1 + δ: near the start the difference would be lost.
    What is absent is zero. What stands in brackets does not cost what a thin update costs (docs/algebra.md, "What
    costs more"): maps R_k of the inputs (columns, blocks), structured updates S_j (Kronecker products), and a dense D
    of pieces without structure (Full). Norms use the dense form where none of the closed ones below holds.

    Shapes:
        delta: [out], or [1] where every row has the same; U: [out, R]; V: [R, in]; remainder: [out, in].

    Args:
        base: the frozen weight W, through its calls.
        delta: δ, the per-row change of gain of the base weight.
        U: left factor.
        V: right factor.
        remainder: D.
        turns: the maps of inputs with their gains; at most one has the base's own gain 1 + δ.
        structured: the structured updates with their gains.
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
    turns: tuple[Turn, ...] = ()
    structured: tuple[Structured, ...] = ()

    # What a wrapper may do. Each operation is one closure rule of the algebra.

    def calibrate_base(self, shift: Tensor) -> "FactoredWeight":
        """W' + diag(shift) W: the base term alone is changed, before the update is added. shift: [out] or [1]."""
        self._check_gain(shift)
        turns = tuple(Turn(turn.map, self._gain_of(turn)) for turn in self.turns)
        return replace(self, delta=_add(shift, self.delta), turns=turns)

    def scale_rows(self, gain: Tensor) -> "FactoredWeight":
        """diag(gain) W': base and update alike. gain: [out] or [1]."""
        return self.mix(gain, gain)

    def mix(self, base_gain: Tensor, update_gain: Tensor) -> "FactoredWeight":
        """a∘W + b∘(W' − W): each gain [1] or [out], by rows.

        δ ← (a − 1) + b δ, U ← b U, D ← b D, g ← b g, h ← b h. A turn with the base's own gain keeps it where a is b.
        """
        self._check_gain(base_gain)
        self._check_gain(update_gain)
        inner = None if self.delta is None else update_gain * self.delta
        column = update_gain[:, None]
        follows = base_gain is update_gain
        return replace(
            self,
            delta=_add(base_gain - 1, inner),
            U=None if self.U is None else column * self.U,
            remainder=None if self.remainder is None else column * self.remainder,
            turns=tuple(
                turn if follows and turn.gain is None else Turn(turn.map, update_gain * self._gain_of(turn))
                for turn in self.turns
            ),
            structured=tuple(term.scaled(update_gain) for term in self.structured),
        )

    def rotate(self, X: Tensor, Y: Tensor) -> "FactoredWeight":
        """(I + X Y) W' with a thin X: [out, k] and Y: [k, out].

        U ← [U + X (Y U), X], V ← [V; Y (W' − U V)].
        """
        base = self._turned_base
        rows = base.apply_t(Y if self.delta is None else Y + Y * self.delta)
        for turn in self.turns:
            if turn.gain is not None:
                rows = rows + turn.map.change_of_rows(self.base.apply_t(Y * turn.gain))
        for term in self.structured:
            rows = rows + term.apply_t(Y)
        if self.remainder is not None:
            rows = rows + Y @ self.remainder
        if self.U is None or self.V is None:
            return replace(self, U=X, V=RightFactor(base, rows))
        return replace(self, U=torch.cat([self.U + X @ (Y @ self.U), X], dim=1), V=self.V.extended(rows))

    def turn(self, change: InputMap) -> "FactoredWeight":
        """W' R, R a map of the inputs: V ← V R, D ← D R, and a turn beside every base term.

        Structured updates become dense. A turn with the base's own gain and others never stand together: a `mix` of
        two gains gives each its own, and the turn that is added here takes what the others leave of 1 + δ.
        """
        gains = [turn.gain for turn in self.turns if turn.gain is not None]
        turns = [Turn(turn.map.then(change), turn.gain) for turn in self.turns]
        if len(gains) == len(turns):  # no turn has the base's own gain yet
            rest = None if not gains else self._own_gain() - sum(gains[1:], start=gains[0])
            turns.append(Turn(change, rest))
        turned = replace(self, remainder=None, turns=tuple(turns), structured=())
        dense = self._dense_updates()
        V = None if self.V is None else RightFactor(turned._turned_base, change.of_rows(self.V.value))
        return replace(turned, V=V, remainder=None if dense is None else change.of_rows(dense))

    def _check_gain(self, gain: Tensor) -> None:
        out = self.base.shape[0]
        if gain.shape not in ((out,), (1,)):
            raise PieceError(
                f"a gain of rows has the shape {list(gain.shape)}; need [{out}], one for each output, or [1] "
                "(columns are scaled by inner.turn(Columns(shift)))"
            )

    def _own_gain(self) -> Tensor:
        """1 + δ: [out] or [1]."""
        return torch.ones(1, dtype=self.dtype, device=self.base.device) if self.delta is None else 1 + self.delta

    def _gain_of(self, turn: Turn) -> Tensor:
        return self._own_gain() if turn.gain is None else turn.gain

    # What a forward may ask.

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that factors are built in."""
        tensors = (self.delta, self.U, self.remainder)
        known = next((tensor.dtype for tensor in tensors if tensor is not None), None)
        return known or torch.promote_types(self.base.dtype, torch.float32)

    @property
    def own_turn(self) -> InputMap | None:
        """The map of inputs that has the base's own gain 1 + δ: base and turn are one product diag(1 + δ) W R."""
        return next((turn.map for turn in self.turns if turn.gain is None), None)

    @property
    def other_turns(self) -> tuple[Turn, ...]:
        """The turns with gains of their own: a product with W each."""
        return tuple(turn for turn in self.turns if turn.gain is not None)

    def dense_terms(self) -> Tensor | None:
        """All that is neither δ nor U V, as a matrix: [out, in]; None if there is nothing."""
        parts = [self._gain_of(turn)[:, None] * self._turned(turn.map) for turn in self.turns]
        dense = self._dense_updates()
        parts += [] if dense is None else [dense]
        return sum(parts[1:], start=parts[0]) if parts else None

    def _turned(self, map: InputMap) -> Tensor:
        """W (R − I): [out, in]."""
        return map.change_of_rows(self.base.dense().to(self.dtype))

    def _dense_updates(self) -> Tensor | None:
        """D and the structured updates, as a matrix."""
        parts = [] if self.remainder is None else [self.remainder]
        parts += [term.dense() for term in self.structured]
        return sum(parts[1:], start=parts[0]) if parts else None

    @property
    def _turned_base(self) -> Base:
        """W, or W R where a turn has the base's own gain."""
        own = self.own_turn
        return self.base if own is None else TurnedBase(self.base, own)

    # What a wrapper may ask. Each closed form stands beside its dense definition.

    def row_norms(self, constant: bool = False) -> Tensor:
        """‖w'_i‖ of every row of W': [out], in the factors' dtype, with the subgradient 0 on a zero row.

        ‖w'_i‖² = l_i²‖w_i‖² + 2 l_i ⟨(W Vᵀ)_i, U_i⟩ + ⟨(U V Vᵀ)_i, U_i⟩ with l = 1 + δ, clamped at zero.

        Args:
            constant: without a gradient. The products that other norms may share have theirs all the same.
        """
        if constant:
            if self.V is not None and not self._is_bulky:
                _ = self.V.projected
            with torch.no_grad():
                return self.row_norms().detach()  # no_grad alone does not stop forward-mode derivatives
        if self._is_bulky:
            return safe_sqrt(row_norms_sq(self.dense())).to(self.dtype)
        squares = self._turned_base.row_norms_sq()
        gain = squares.new_ones(1) if self.delta is None else 1 + wide(self.delta)
        return safe_sqrt(self._row_squares(squares, gain)).to(self.dtype)

    @property
    def _is_bulky(self) -> bool:
        """Whether norms need the dense form."""
        return bool(self.other_turns or self.structured) or self.remainder is not None

    def column_norms(self, constant: bool = False) -> Tensor:
        """‖(W'ᵀ)_j‖ of every column of W': [in], in the factors' dtype, with the subgradient 0 on a zero column.

        ‖W'_:j‖² = Σ_i l_i² W_ij² + 2 ⟨((l∘U)ᵀ W)_:j, V_:j⟩ + ⟨(UᵀU V)_:j, V_:j⟩ with l = 1 + δ, clamped at zero. Where
        δ differs from row to row the first sum is a pass over W.

        Args:
            constant: without a gradient.
        """
        if constant:
            with torch.no_grad():
                return self.column_norms().detach()
        if self._is_bulky or self.turns:
            return safe_sqrt(column_norms_sq(self.dense())).to(self.dtype)
        squares = self.base.column_norms_sq()
        if self.delta is not None:
            change = wide(self.delta * (2 + self.delta))
            own = len(change) == 1
            squares = squares + (change * squares if own else squared_columns(self.base.dense(), change))
        if self.U is not None and self.V is not None:
            U = self.U if self.delta is None else (1 + self.delta)[:, None] * self.U
            V = wide(self.V.value)
            cross = wide(self.base.apply_t(U.mT))
            squares = squares + ((2 * cross + wide(self.U).mT @ wide(self.U) @ V) * V).sum(dim=0)
        return safe_sqrt(squares).to(self.dtype)

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
        if self.turns or self.remainder is not None or (self.structured and not self._is_one_structure()):
            return row_norms_sq(self.dense_update())
        if self.structured:
            return self.structured[0].update.row_norms_sq()  # any gain of its rows comes with a δ
        gain = None if self.delta is None else wide(self.delta)
        return self._row_squares(self.base.row_norms_sq(), gain)

    def _is_one_structure(self) -> bool:
        """Whether the update is one structured term and nothing else."""
        return len(self.structured) == 1 and self.delta is None and self.U is None

    def _row_squares(self, squares: Tensor, gain: Tensor | None) -> Tensor:
        """‖gain_i w_i + (U V)_i‖²: [out], in float64; no gain is 0."""
        if self.U is None or self.V is None:
            return torch.zeros_like(squares) if gain is None else gain.square() * squares
        projected = None if gain is None else self.V.projected
        return row_squares(squares, gain, projected, self.U, self.V.value, self.V.gram)

    def dense_update(self) -> Tensor:
        """W' − W as a matrix: [out, in], without subtracting: the definition of the normal form."""
        parts: list[Tensor] = []
        if self.delta is not None:
            parts.append(self.delta[:, None] * self.base.dense().to(self.dtype))
        if self.U is not None and self.V is not None:
            parts.append(self.U @ self.V.value)
        rest = self.dense_terms()
        parts += [] if rest is None else [rest]
        return sum(parts[1:], start=parts[0]) if parts else torch.zeros_like(self.base.dense(), dtype=self.dtype)

    def dense(self) -> Tensor:
        """W' as a matrix: [out, in], in the factors' dtype."""
        update = self.dense_update()
        return self.base.dense().to(update.dtype) + update


def _add(left: Tensor, right: Tensor | None) -> Tensor:
    return left if right is None else left + right
