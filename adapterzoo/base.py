"""What an adapter may ask of the weight under it: four calls, and norms that are kept while the weight stands still."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 2**20  # elements of a row block that is widened at a time (8 MiB in float64)


class Base(Protocol):
    """The frozen weight W: [out, in] under an adapter, seen through four calls.

    A quantised weight implements the same four with its own kernels; nothing else in the library reads W.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that inputs must have outside autocast."""
        ...

    @property
    def device(self) -> torch.device:
        """Where W lives."""
        ...

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X Wᵀ + bias: [..., in] -> [..., out], as the base layer itself computes it."""
        ...

    def apply_t(self, y: Tensor) -> Tensor:
        """Y W: [..., out] -> [..., in]."""
        ...

    def row_norms_sq(self) -> Tensor:
        """‖w_i‖² of every row: [out], in float64."""
        ...

    def dense(self) -> Tensor:
        """W itself: [out, in], in its own dtype."""
        ...


def wide(x: Tensor) -> Tensor:
    """Widen a thin tensor for sums of squares: float64, or float32 where the device has no float64 (MPS)."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def row_norms_sq(matrix: Tensor) -> Tensor:
    """‖m_i‖² of every row of a matrix [out, in]: [out], summed in float64 by row blocks, differentiable."""
    return torch.cat([wide(block).square().sum(dim=1) for block in _row_blocks(matrix)])


def safe_sqrt(x: Tensor) -> Tensor:
    """√x with the subgradient 0 (not infinity) at 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, torch.ones_like(x)).sqrt(), torch.zeros_like(x))


class NormCache:
    """Row norms of one frozen weight, kept until that weight changes.

    The cache is bound to one tensor. Another tensor (functional_call, torch.func, an unmerged copy) is computed
    and not kept; a change of the bound tensor's storage or version is seen; `bind` and `clear` are called where a
    change can't be seen (loading, moving, merging, copying). A copy or a pickle starts empty and unbound.
    """

    def __init__(self) -> None:
        self._bound: int | None = None  # an id: a weak reference would forbid torch to swap the tensor's contents
        self._key: tuple[Any, ...] | None = None
        self._value: Tensor | None = None

    def bind(self, weight: Tensor) -> None:
        """Keep the norms of this tensor from now on."""
        self.clear()
        self._bound = id(weight)

    def clear(self) -> None:
        """Forget the values; the binding stays."""
        self._key = self._value = None

    def see(self, weight: Tensor) -> None:
        """Forget the values of a weight that trains: fused optimisers change one and leave its `_version` as it was."""
        if weight.requires_grad:
            self.clear()

    def row_norms_sq(self, weight: Tensor) -> Tensor:
        """‖w_i‖²: [out] in float64, from the cache where the weight is the bound one and has not changed."""
        self.see(weight)
        if weight.requires_grad:
            return row_norms_sq(weight)
        if torch.compiler.is_compiling():  # a value frozen into a graph would be checked by nobody
            return row_norms_sq(weight)
        if self._bound != id(weight) or weight.is_inference():
            return row_norms_sq(weight)
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self._value is None or key != self._key:
            with torch.inference_mode(False), torch.no_grad():
                self._value, self._key = row_norms_sq(weight), key
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> "NormCache":
        return NormCache()

    def __reduce__(self) -> tuple[type["NormCache"], tuple[()]]:
        return NormCache, ()


class DenseBase:
    """A weight that is an ordinary floating-point matrix.

    Args:
        weight: W: [out, in].
        norms: where its row norms are kept between calls.
    """

    def __init__(self, weight: Tensor, norms: NormCache) -> None:
        self.weight = weight
        self._norms = norms

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where W lives."""
        return self.weight.device

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X Wᵀ + bias: [..., in] -> [..., out], by torch's own linear.

        Without a bias, an x wider than W is never rounded: W is widened by row blocks.
        """
        if bias is None and _wider(x, self.weight):
            return _Apply.apply(x, self.weight)  # type: ignore[no-any-return, no-untyped-call]
        return F.linear(x, self.weight, bias)

    def apply_t(self, y: Tensor) -> Tensor:
        """Y W: [..., out] -> [..., in]. A y wider than W is never rounded, and W is widened by row blocks."""
        if _wider(y, self.weight):
            return _ApplyT.apply(y, self.weight)  # type: ignore[no-any-return, no-untyped-call]
        return y @ self.weight

    def row_norms_sq(self) -> Tensor:
        """‖w_i‖²: [out] in float64."""
        return self._norms.row_norms_sq(self.weight)

    def dense(self) -> Tensor:
        """W: [out, in]."""
        return self.weight


def _wider(x: Tensor, weight: Tensor) -> bool:
    if torch.is_autocast_enabled(x.device.type):
        return False  # autocast brings both to one dtype
    return x.dtype.itemsize > weight.dtype.itemsize


def _row_blocks(matrix: Tensor) -> Iterator[Tensor]:
    rows = max(1, _BLOCK // max(1, matrix.shape[1]))
    return iter(matrix.split(rows))  # type: ignore[no-untyped-call]


# Note [Wide products with a 16-bit weight]
# A thin float32 factor times a bf16 W must not round the factor (row norms would be good to 1e-3 only), and must not
# keep a float32 copy of W: plain autograd would save every widened block for backward. So the two products are
# each other's backward, and both widen W block by block. Both are linear in their first argument, so double backward
# and vmap follow from the same two functions. (No forward mode: a jvp of theirs would break torch.compile's graph.)
class _Apply(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([F.linear(x, block.to(x.dtype)) for block in _row_blocks(weight)], dim=-1)

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
        total = y.new_zeros(*y.shape[:-1], weight.shape[1])
        start = 0
        for block in _row_blocks(weight):
            total += y[..., start : start + len(block)] @ block.to(y.dtype)
            start += len(block)
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
