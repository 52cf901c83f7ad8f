"""Linear layers: torch's own, and Hugging Face's Conv1D, which stores its weight transposed."""

import sys
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterzoo.base import Base, WeightShape, own_forward
from adapterzoo.factored import FactoredWeight
from adapterzoo.forms.form import Form, odd_weight, wrong_dtype
from adapterzoo.functional import factored_linear
from adapterzoo.terms import Turn


class Linear(Form):
    """nn.Linear: W is the weight."""

    kind: ClassVar[str] = "linear"

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether it is an nn.Linear."""
        return isinstance(module, nn.Linear)

    @classmethod
    def problem(cls, module: nn.Module) -> str | None:
        """It needs torch's own forward and an ordinary weight."""
        return own_forward(module, nn.Linear) or super().problem(module)

    def _shape(self) -> WeightShape:
        """(out_features, in_features)."""
        return WeightShape(*self.matrix(cast(Tensor, self.module.weight)).shape)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight

    def stored(self, matrix: Tensor) -> Tensor:
        """The matrix itself."""
        return matrix

    def bad_input(self, x: Tensor, weight: Tensor) -> str | None:
        """Inputs are [..., in], in the weight's dtype."""
        width = self.matrix(weight).shape[1]
        if x.dim() == 0 or x.shape[-1] != width:
            return f"takes inputs [..., {width}]; got {list(x.shape)}"
        return wrong_dtype(x, weight)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """X Wᵀ + bias: [..., in] -> [..., out]."""
        return F.linear(x, self.matrix(weight), bias)

    def adapted(
        self, x: Tensor, stored: Tensor, weight: FactoredWeight, bias: Tensor | None, dropout: float, lean: bool
    ) -> Tensor:
        """X W'ᵀ + bias: [..., in] -> [..., out], by the one kernel."""
        return through_the_kernel(x, weight.base, weight, bias, dropout, lean)


def through_the_kernel(
    x: Tensor, base: Base, weight: FactoredWeight, bias: Tensor | None, dropout: float, lean: bool
) -> Tensor:
    """X W'ᵀ + bias: [..., in] -> [..., out], with x Wᵀ by the base that is given."""
    own = weight.own_turn
    y = factored_linear(
        x,
        base,
        weight.delta,
        weight.U,
        None if weight.V is None else weight.V.value,
        bias,
        remainder=weight.remainder,
        turned=None if own is None else own.of_inputs(x),
        dropout=dropout,
        drop_rows=weight.drop_rows,
        lean=lean,
    )
    extra = [_turned_product(x, base, turn) for turn in weight.other_turns]
    extra += [term.apply(x.to(y.dtype)) for term in weight.structured]
    if not extra:
        return y
    return sum(extra, start=y.to(torch.promote_types(y.dtype, torch.float32))).to(y.dtype)


def _turned_product(x: Tensor, base: Base, turn: Turn) -> Tensor:
    """G ∘ ((x (R − I)ᵀ) Wᵀ): [..., out]."""
    assert turn.gain is not None
    return base.apply(turn.map.change_of_inputs(x)) * turn.gain


class Transposed(Linear):
    """Transformers' Conv1D (GPT-2), a linear layer that stores Wᵀ: [in, out]."""

    kind: ClassVar[str] = "transposed"

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether it is a Conv1D of Transformers, which is not imported for that."""
        kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
        return kind is not None and isinstance(module, kind)

    @classmethod
    def problem(cls, module: nn.Module) -> str | None:
        """It needs Transformers' own forward and an ordinary weight."""
        return own_forward(module, sys.modules["transformers.pytorch_utils"].Conv1D) or odd_weight(module)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight transposed."""
        return weight.mT

    def stored(self, matrix: Tensor) -> Tensor:
        """The matrix transposed."""
        return matrix.mT
