"""What an adapter may ask of the weight under it: a few calls."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterzoo.kept import NormCache
from adapterzoo.wide import column_norms_sq, in_forward_mode, row_blocks, row_norms_sq


class WeightShape(NamedTuple):
    """The shape of a weight as a matrix W: [out, in], and the kernel that its columns are made of.

    Args:
        out_features: rows of W: outputs, filters, or the dimensions of an embedding.
        in_features: columns of W: inputs, in/groups · kernel elements, or the entries of an embedding.
        kernel: the spatial size of a convolution's kernel, such as (3, 3); () for other layers.
    """

    out_features: int
    in_features: int
    kernel: tuple[int, ...] = ()

    @property
    def in_channels(self) -> int:
        """Inputs that a filter reads at each place of its kernel: in/groups."""
        return self.in_features // max(1, prod(self.kernel))


OWN_FORWARD = "it has a forward of its own, which an adapter would bypass"


def own_forward(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Say that a subclass, or a library that places models on devices, has given a module another forward; or None."""
    return None if type(module).forward is kind.forward and "forward" not in vars(module) else OWN_FORWARD


class Base(Protocol):
    """The frozen weight W: [out, in] under an adapter, seen through a few calls.

    A quantised weight implements the same ones with its own kernels; nothing else in the library reads W.
    """

    @property
    def shape(self) -> WeightShape:
        """(out, in), and the kernel of a convolution."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that inputs must have outside autocast."""
        ...

    @property
    def device(self) -> torch.device:
        """Where W lives."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the calls below read: a change of them between forward and backward is an error."""
        ...

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X Wᵀ + bias: [..., in] -> [..., out], as the base layer itself computes it; a tensor that none shares."""
        ...

    def apply_t(self, y: Tensor) -> Tensor:
        """Y W: [..., out] -> [..., in]; a tensor that none shares."""
        ...

    def row_norms_sq(self) -> Tensor:
        """‖w_i‖² of every row: [out], in float64."""
        ...

    def column_norms_sq(self) -> Tensor:
        """The squares of the lengths of the columns: [in], in float64."""
        ...

    def dense(self) -> Tensor:
        """W itself: [out, in], in its own dtype."""
        ...


class DenseBase:
    """A weight that is an ordinary floating-point tensor, stored in any layout.

    Args:
        weight: the weight as its layer stores it.
        norms: where its row norms are kept between calls.
        matrix: from that layout to W: [out, in].
        kernel: the spatial size of a convolution's kernel.
    """

    def __init__(
        self,
        weight: Tensor,
        norms: NormCache,
        matrix: Callable[[Tensor], Tensor] | None = None,
        shape: WeightShape | None = None,
    ) -> None:
        self.weight = weight
        self._to_matrix, self._norms = matrix, norms
        self._shape = WeightShape(*weight.shape) if shape is None else shape

    @property
    def matrix(self) -> Tensor:
        """W: [out, in]; a copy where the layout has no view of it, so it is made only where it is read."""
        return self.weight if self._to_matrix is None else self._to_matrix(self.weight)

    @property
    def shape(self) -> WeightShape:
        """(out, in), and the kernel."""
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where W lives."""
        return self.weight.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weight as it is stored."""
        return (self.weight,)

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X Wᵀ + bias: [..., in] -> [..., out], by torch's own linear.

        Without a bias, an x wider than W is never rounded: W is widened by row blocks.
        """
        if bias is None and _wider(x, self.matrix):
            if in_forward_mode():
                return F.linear(x, self.matrix.to(x.dtype))
            return _Apply.apply(x, self.matrix)  # type: ignore[no-any-return, no-untyped-call]
        return F.linear(x, self.matrix, bias)

    def apply_t(self, y: Tensor) -> Tensor:
        """Y W: [..., out] -> [..., in]. A y wider than W is never rounded, and W is widened by row blocks."""
        if _wider(y, self.matrix):
            if in_forward_mode():
                return y @ self.matrix.to(y.dtype)
            return _ApplyT.apply(y, self.matrix)  # type: ignore[no-any-return, no-untyped-call]
        return y @ self.matrix

    def row_norms_sq(self) -> Tensor:
        """‖w_i‖²: [out] in float64."""
        return self._norms.row_norms_sq(self.weight, self._row_norms_sq)

    def _row_norms_sq(self, weight: Tensor) -> Tensor:
        return row_norms_sq(weight if self._to_matrix is None else self._to_matrix(weight))

    def column_norms_sq(self) -> Tensor:
        """The squares of the lengths of the columns: [in] in float64."""
        return self._norms.get("columns", self.weight, self._column_norms_sq)

    def _column_norms_sq(self, weight: Tensor) -> Tensor:
        return column_norms_sq(weight if self._to_matrix is None else self._to_matrix(weight))

    def dense(self) -> Tensor:
        """W: [out, in]."""
        return self.matrix


def _wider(x: Tensor, weight: Tensor) -> bool:
    if torch.is_autocast_enabled(x.device.type):
        return False  # autocast brings both to one dtype
    return x.dtype.itemsize > weight.dtype.itemsize


# Note [Wide products with a 16-bit weight]
# A thin float32 factor times a bf16 W must not round the factor (row norms would be good to 1e-3 only), and must not
# keep a float32 copy of W: plain autograd would save every widened block for backward. So the two products are
# each other's backward, and both widen W block by block. Both are linear in their first argument, so double backward
# and vmap follow from the same two functions. (Forward mode goes around them: a jvp of theirs would break
# torch.compile's graph.)
class _Apply(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([F.linear(x, block.to(x.dtype)) for block in row_blocks(weight)], dim=-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0] if inputs[1].requires_grad else None, inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        return _ApplyT.apply(grad, weight), None if x is None else _outer(grad, x).to(weight.dtype)  # type: ignore[no-untyped-call]


class _ApplyT(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, weight: Tensor) -> Tensor:
        blocks = row_blocks(weight)
        parts = y.split([len(block) for block in blocks], dim=-1)  # type: ignore[no-untyped-call]
        total = y.new_zeros(*y.shape[:-1], weight.shape[1])
        for part, block in zip(parts, blocks, strict=True):
            total += part @ block.to(y.dtype)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0] if inputs[1].requires_grad else None, inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        y, weight = ctx.saved_tensors
        return _Apply.apply(grad, weight), None if y is None else _outer(y, grad).to(weight.dtype)  # type: ignore[no-untyped-call]


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Σ_t left_t rightᵀ_t: [..., out], [..., in] -> [out, in]."""
    return left.reshape(-1, left.shape[-1]).mT @ right.reshape(-1, right.shape[-1])
