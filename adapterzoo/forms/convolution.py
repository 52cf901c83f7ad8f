"""Convolutions: the kernel is a matrix [out, in/groups · kernel], applied through the layer's own arguments."""

from math import prod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterzoo.base import OWN_FORWARD, WeightShape, own_forward
from adapterzoo.factored import FactoredWeight
from adapterzoo.forms.form import Form, wrong_dtype
from adapterzoo.kernel import Dropout
from adapterzoo.wide import in_transform

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _Term(NamedTuple):
    """One part of the update, a pair (U, V) and the input that it sees."""

    x: Tensor
    U: Tensor
    V: Tensor
    steps: tuple[Tensor, Tensor] | None


class Convolution(Form):
    """nn.Conv1d, Conv2d and Conv3d, with every stride, padding, padding mode, dilation and number of groups.

        y = x ⋆ W' + bias = (1 + δ) ∘ (x ⋆ W) + (x ⋆ V) ⋆ U + x ⋆ D + bias

    D is all that is neither δ nor thin, as one kernel.

    V is a kernel like W's, applied through the layer's own arguments, in each group by itself; U is a 1×1 convolution.
    Where that costs more than the kernel U V itself, as in depthwise layers, that kernel is formed.
    """

    kind: ClassVar[str] = "convolution"
    is_linear: ClassVar[bool] = False
    token_wise: ClassVar[bool] = False

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether it is a convolution of torch (a transposed one is not)."""
        return isinstance(module, _KINDS)

    @classmethod
    def problem(cls, module: nn.Module) -> str | None:
        """It needs torch's own forward and an ordinary weight."""
        own = next(kind for kind in _KINDS if isinstance(module, kind))
        if type(module)._conv_forward is not own._conv_forward:  # type: ignore[attr-defined]
            return OWN_FORWARD
        return own_forward(module, own) or super().problem(module)

    def _shape(self) -> WeightShape:
        """(out_channels, in/groups · kernel elements, kernel size)."""
        out, *rest = self.module.weight.shape
        return WeightShape(out, prod(rest), tuple(rest[1:]))

    def matrix(self, weight: Tensor) -> Tensor:
        """Every filter as a row."""
        return weight.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        """Every row as a filter."""
        return matrix.reshape(len(matrix), self.shape.in_channels, *self.shape.kernel)

    def bad_input(self, x: Tensor, weight: Tensor) -> str | None:
        """Inputs are [batch, channels, ...] or [channels, ...], in the weight's dtype."""
        dims = len(self.module.kernel_size)
        if x.is_nested or x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != self.module.in_channels:
            places = ", ".join("DHW"[3 - dims :])
            got = "a nested tensor" if x.is_nested else list(x.shape)
            return f"takes inputs [batch, {self.module.in_channels}, {places}]; got {got}"
        return wrong_dtype(x, weight)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """X ⋆ W + bias, as the layer itself computes it."""
        y: Tensor = self.module._conv_forward(x, weight, bias)
        return y

    def adapted(
        self, x: Tensor, stored: Tensor, weight: FactoredWeight, bias: Tensor | None, dropout: float, lean: bool
    ) -> Tensor:
        """X ⋆ W' + bias, summed in at least float32 and rounded once more; `lean` is nothing here."""
        delta = weight.delta
        z = self.plain(x, stored, bias if delta is None else None)
        updates = [self._pair(term) for term in self._terms(x, weight, dropout)]
        rest = weight.dense_terms()
        if rest is not None:
            updates.append(self.plain(x, self._cast(rest, z), None))
        with torch.autocast(x.device.type, enabled=False):
            y, total = z, torch.promote_types(z.dtype, torch.float32)
            if len(updates) > 1:  # a single one is added with one rounding in any case
                y = z.to(total)
            if delta is not None:
                gain = self._one_by_one(1 + delta).to(total)
                y = z * gain if bias is None else torch.addcmul(self._one_by_one(bias).to(total), z, gain)
            for update in updates:  # in place of what no backward reads, but for torch.func, which can't follow
                y = y + update if y is z or in_transform() else y.add_(update)
            return y.to(z.dtype)

    def _terms(self, x: Tensor, weight: FactoredWeight, dropout: float) -> list[_Term]:
        """The pairs of the update: the generator's own rows apart where dropout acts on them."""
        if weight.U is None or weight.V is None:
            return []
        U, V, steps = weight.U, weight.V.value, weight.V.steps
        own, seen = weight.drop_rows if dropout or steps is not None else len(V), x
        if dropout:
            drop = Dropout.draw(x, dropout, own)
            seen = torch.where(drop.dropped, 0, x) / (1 - drop.p)
        terms = [_Term(seen, U[:, :own], V[:own], steps)] if own else []
        return terms if own == len(V) else [*terms, _Term(x, U[:, own:], V[own:], None)]

    def _pair(self, term: _Term) -> Tensor:
        """X ⋆ (U V): in two or three steps, or by the kernel where that costs less."""
        groups, (out, columns) = self.module.groups, self.shape[:2]
        x, U, V, steps = term
        if self._cost(V, steps) >= out * columns:
            with torch.autocast(x.device.type, enabled=False):
                kernel = self._cast(U @ V, x)
            return self.plain(x, kernel, None)
        if steps is None:
            hidden = self.plain(x, self._cast(V, x).repeat(groups, *self._ones), None)
        else:
            core, channels = steps
            narrow = self._one_by_one(channels).to(x.dtype).repeat(groups, *self._ones)
            inside = self._convolve(x, narrow, groups)
            hidden = self.plain(inside, core.to(x.dtype).repeat(groups, *self._ones), None)
        return self._convolve(hidden, self._one_by_one(U).to(hidden.dtype), groups)

    def _cost(self, V: Tensor, steps: tuple[Tensor, Tensor] | None) -> int:
        """Products at one place of the output, in the steps of `_pair`; the kernel has out · in/groups · size."""
        groups, out = self.module.groups, self.shape.out_features
        inside = groups * (V.numel() if steps is None else sum(step.numel() for step in steps))
        return inside + out * len(V)

    def _cast(self, matrix: Tensor, like: Tensor) -> Tensor:
        """A matrix [n, in/groups · size] as a kernel, in the dtype of a product."""
        return self.stored(matrix).to(like.dtype)

    def _one_by_one(self, values: Tensor) -> Tensor:
        """A matrix as a 1×1 kernel, or a vector so that it multiplies channels."""
        return values[(..., *(None for _ in self.shape.kernel))]

    def _convolve(self, x: Tensor, kernel: Tensor, groups: int) -> Tensor:
        y: Tensor = _CONVOLVE[len(self.shape.kernel)](x, kernel, groups=groups)
        return y

    @property
    def _ones(self) -> tuple[int, ...]:
        return (1,) * (1 + len(self.shape.kernel))
