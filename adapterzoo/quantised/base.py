"""What every quantised weight has in common: its rows, dequantised block by block, and the products made of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import copy
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterzoo.base import WeightShape
from adapterzoo.kept import NormCache
from adapterzoo.wide import column_norms_sq, in_forward_mode, wide_dtype

_BLOCK = 2**20  # elements that are dequantised at a time for norms and thin factors
_WHOLE = 2**24  # for products with gradients; a library's own backward dequantises all of W


class QuantisedBase(ABC):
    """The frozen weight W: [out, in] of a quantised linear layer, through the calls of `adapterzoo.base.Base`.

    W is what the codes and their scales say, in float32. It is never formed as a whole but by `dense`.

        apply(x) = x Wᵀ + bias    apply_t(y) = y W    row_norms_sq() = (‖w_i‖²)_i    dense() = W

    There are two of it. The one that is built is exact: its products don't round W, x or y below their own dtype. Norms
    and factors are made of it. `by_kernel()` is the one that inputs run through: its `apply` is the library's own
    kernel, with whatever that rounds (bitsandbytes rounds the inputs of 8-bit layers to 8 bits, and those of 4-bit
    layers to the compute dtype), so an adapter that does nothing changes no bit of the output.

    Shapes:
        x: [..., in]; y: [..., out]; W: [out, in].

    Args:
        module: the plain quantised layer.
        weight: its quantised weight, which is not in its place while a merged one is.
        norms: where its row norms are kept between calls.
    """

    kind: ClassVar[str]
    """One or two words for it, in messages and files."""

    def __init__(self, module: nn.Module, weight: Tensor, norms: NormCache) -> None:
        self.module: Any = module
        self.weight: Any = weight
        self._norms = norms
        self._by_kernel = False

    @classmethod
    @abstractmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether a module is of this kind."""

    @classmethod
    @abstractmethod
    def problem(cls, module: nn.Module) -> str | None:
        """Say why a module of this kind can't be adapted, and what to do; None if it can."""

    @abstractmethod
    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows of W: [stop − start, in], rounded once, to the dtype. `start` is a multiple of `step`."""

    @abstractmethod
    def kernel(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """X Wᵀ + bias, as the plain layer computes it; called without grad mode."""

    @property
    def step(self) -> int:
        """Where blocks of rows may start: at its multiples."""
        return 1

    @property
    def shape(self) -> WeightShape:
        """(out, in)."""
        return WeightShape(self.module.out_features, self.module.in_features)

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype that the layer was quantised from, and that a dequantised weight gets."""

    @property
    def device(self) -> torch.device:
        """Where the codes live."""
        device: torch.device = self.weight.device
        return device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The codes as the layer stores them."""
        return (self.weight,)

    def by_kernel(self) -> Self:
        """The same weight, with inputs run through the library's own kernel."""
        other = copy(self)
        other._by_kernel = True
        return other

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X Wᵀ + bias: [..., in] -> [..., out], differentiable."""
        if in_forward_mode():
            return F.linear(x, self.dense().to(x.dtype), bias)
        y: Tensor = _Apply.apply(x, bias, self)  # type: ignore[no-untyped-call]
        return y

    def apply_t(self, y: Tensor) -> Tensor:
        """Y W: [..., out] -> [..., in], differentiable; W is dequantised to y's dtype, as in the library's backward."""
        if in_forward_mode():
            return y @ self.dense().to(y.dtype)
        x: Tensor = _ApplyT.apply(y, self)  # type: ignore[no-untyped-call]
        return x

    def row_norms_sq(self) -> Tensor:
        """‖w_i‖²: [out], in float64, computed once and by blocks."""
        return self._norms.row_norms_sq(self.weight, self._row_norms_sq)

    def column_norms_sq(self) -> Tensor:
        """The squares of the lengths of the columns: [in], in float64, computed once and by blocks."""
        return self._norms.get("columns", self.weight, self._column_norms_sq)

    def dense(self) -> Tensor:
        """W: [out, in], in float32: 16 bits are coarser than codes times scales."""
        return self.rows(0, self.shape.out_features, torch.float32)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`apply` without its gradient."""
        if self._by_kernel:
            return self.kernel(x, bias)
        blocks = [F.linear(x, self.rows(start, stop, x.dtype)) for start, stop in self._ranges(_BLOCK)]
        y = torch.cat(blocks, dim=-1)
        return y if bias is None else y + bias

    def product_t(self, y: Tensor) -> Tensor:
        """`apply_t` without its gradient: several blocks are summed in at least float32."""
        ranges = list(self._ranges(_WHOLE))
        if len(ranges) == 1:
            return y @ self.rows(*ranges[0], y.dtype)
        total = y.new_zeros(*y.shape[:-1], self.shape.in_features, dtype=torch.promote_types(y.dtype, torch.float32))
        for start, stop in ranges:
            total += y[..., start:stop] @ self.rows(start, stop, y.dtype)
        return total.to(y.dtype)

    def _row_norms_sq(self, weight: Tensor) -> Tensor:
        dtype = wide_dtype(self.device)
        blocks = (self.rows(start, stop, torch.float32) for start, stop in self._ranges(_BLOCK))
        return torch.cat([torch.linalg.vector_norm(block, dim=1, dtype=dtype) for block in blocks]).square()

    def _column_norms_sq(self, weight: Tensor) -> Tensor:
        total = torch.zeros(self.shape.in_features, dtype=wide_dtype(self.device), device=self.device)
        for start, stop in self._ranges(_BLOCK):
            total += column_norms_sq(self.rows(start, stop, torch.float32))
        return total

    def _ranges(self, elements: int) -> Iterator[tuple[int, int]]:
        """Blocks of rows of about that many elements, each from a multiple of `step`."""
        out, width = self.shape[:2]
        length = max(1, elements // (width * self.step)) * self.step
        return ((start, min(start + length, out)) for start in range(0, out, length))


# Note [Two products that are each other's backward]
# A library's own function would keep a dequantised W for the backward, or refuse it where activations are rounded. Both
# products are linear in their first argument, so each is the other's gradient, to any order. (The kernel rounds: its
# gradient is that of the product that it rounds, as the libraries have it.)
class _Apply(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, base: QuantisedBase) -> Tensor:
        return base.product(x, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, QuantisedBase], output: Tensor) -> None:
        x, bias, ctx.base = inputs
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_x, of_bias = ctx.dtypes
        dx = ctx.base.apply_t(grad).to(of_x) if ctx.needs_input_grad[0] else None
        d_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0, dtype=of_bias) if ctx.needs_input_grad[1] else None
        return dx, d_bias, None


class _ApplyT(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, base: QuantisedBase) -> Tensor:
        return base.product_t(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, QuantisedBase], output: Tensor) -> None:
        y, ctx.base = inputs
        ctx.dtype = y.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.base.apply(grad).to(ctx.dtype), None
