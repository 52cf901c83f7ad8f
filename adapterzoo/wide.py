"""Sums in float64: by row blocks, or of thin products that keep for the backward only what they were made of."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_BLOCK = 2**20  # elements of a row block that is widened at a time (8 MiB in float64)
_CACHED = 2**18  # elements of a row block that a reduction widens in a processor's cache


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums of squares: float64, or float32 where the device has no float64 (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(x: Tensor) -> Tensor:
    """Widen a thin tensor, to `wide_dtype`."""
    return x.to(wide_dtype(x.device))


def safe_sqrt(x: Tensor) -> Tensor:
    """√x with the subgradient 0 (not infinity) at 0, and 0 below it."""
    if _takes_plain_form():
        positive = x > 0
        return torch.where(positive, torch.where(positive, x, 1).sqrt(), x.clamp_min(0).detach())
    return _SafeSqrt.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def row_blocks(matrix: Tensor, elements: int | None = None) -> tuple[Tensor, ...]:
    """Blocks of rows of a matrix, small enough to be widened one at a time."""
    rows = max(1, (elements or _BLOCK) // max(1, matrix.shape[1]))
    return matrix.split(rows)  # type: ignore[no-any-return, no-untyped-call]


def row_norms_sq(matrix: Tensor) -> Tensor:
    """‖m_i‖² of every row of a matrix [out, in]: [out], summed in float64, differentiable; no copy of the matrix."""
    if matrix.is_meta:
        return matrix.new_empty(len(matrix), dtype=wide_dtype(matrix.device))
    if torch.compiler.is_compiling():
        norms: Tensor = torch.linalg.vector_norm(matrix, dim=1, dtype=wide_dtype(matrix.device))
        return norms.square()
    if in_transform():
        return wide(matrix).square().sum(dim=1)
    return _RowNormsSq.apply(matrix)  # type: ignore[no-any-return, no-untyped-call]


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Left @ right: [n, k], [k, m] -> [n, m], in float64."""
    if _takes_plain_form():
        return wide(left) @ wide(right)
    return _WideProduct.apply(left, right)  # type: ignore[no-any-return, no-untyped-call]


def row_squares(
    base: Tensor, gain: Tensor | None, projected: Tensor | None, left: Tensor, right: Tensor, gram: Tensor
) -> Tensor:
    """‖gain_i w_i + (U V)_i‖² of every row, or without a gain ‖(U V)_i‖²: [out], in float64.

    Args:
        base: ‖w_i‖²: [out].
        gain: [out] or [1], in float64.
        projected: W Vᵀ: [out, R]; needed with a gain.
        left: U: [out, R].
        right: V: [R, in].
        gram: V Vᵀ: [R, R], in float64, taken as known; the gradient through it goes to V all the same.
    """
    if _takes_plain_form():
        return _row_squares(base, gain, projected, left, wide_product(right, right.mT))
    return _RowSquares.apply(base, gain, projected, left, right, gram)  # type: ignore[no-any-return, no-untyped-call]


def _row_squares(base: Tensor, gain: Tensor | None, projected: Tensor | None, left: Tensor, gram: Tensor) -> Tensor:
    own = (wide(left) @ gram * wide(left)).sum(dim=1)
    if gain is None or projected is None:
        return own
    cross = (wide(projected) * wide(left)).sum(dim=1)
    return gain * (gain * base + 2 * cross) + own


def column_norms_sq(matrix: Tensor) -> Tensor:
    """‖(Mᵀ)_j‖² of every column of a matrix [out, in]: [in], summed in float64, differentiable; no copy of it."""
    if matrix.is_meta:
        return matrix.new_empty(matrix.shape[1], dtype=wide_dtype(matrix.device))
    return squared_columns(matrix, torch.ones(len(matrix), dtype=wide_dtype(matrix.device), device=matrix.device))


def squared_rows(matrix: Tensor, weights: Tensor) -> Tensor:
    """Σ_j M_ij² v_j, the product (M∘M) v: [out, in], [in] -> [out], in float64, by row blocks; differentiable."""
    if _takes_plain_form() or matrix.requires_grad:
        return wide(matrix).square() @ weights
    return _SquaredRows.apply(matrix, weights)  # type: ignore[no-any-return, no-untyped-call]


def squared_columns(matrix: Tensor, weights: Tensor) -> Tensor:
    """Σ_i M_ij² u_i, the product (M∘M)ᵀ u: [out, in], [out] -> [in], in float64, by row blocks; differentiable."""
    if _takes_plain_form() or matrix.requires_grad:
        return weights @ wide(matrix).square()
    return _SquaredColumns.apply(matrix, weights)  # type: ignore[no-any-return, no-untyped-call]


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is at work."""
    return forward_ad._current_level >= 0


def in_transform() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: they differentiate plain operations."""
    return bool(torch._C._are_functorch_transforms_active()) or in_forward_mode()


def _takes_plain_form() -> bool:
    return torch.compiler.is_compiling() or in_transform()


# Note [Functions that keep narrow tensors]
# Plain autograd would keep every widened operand for the backward: eight bytes an element, and a copy for each use.
# These functions save the tensors they were given and widen them again. Their backwards are made of plain operations,
# so they can be differentiated again. Under torch.compile the plain form is traced: its partitioner recomputes a cast.
class _RowNormsSq(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(matrix)
        blocks = row_blocks(matrix, _CACHED if matrix.device.type == "cpu" else _BLOCK)
        dtype = wide_dtype(matrix.device)  # a reduction widens as it goes, fast where a block fits a processor's cache
        return torch.cat([torch.linalg.vector_norm(block, dim=1, dtype=dtype) for block in blocks]).square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (matrix,) = ctx.saved_tensors
        blocks = row_blocks(matrix)
        parts = zip(blocks, grad.split([len(block) for block in blocks]), strict=True)  # type: ignore[no-untyped-call]
        return torch.cat([(2 * part[:, None] * block).to(matrix.dtype) for block, part in parts])


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return wide(left) @ wide(right)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        for_left, for_right = ctx.needs_input_grad
        return (
            (grad @ wide(right).mT).to(left.dtype) if for_left else None,
            (wide(left).mT @ grad).to(right.dtype) if for_right else None,
        )


class _RowSquares(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, base: Tensor, gain: Tensor | None, projected: Tensor | None, left: Tensor, right: Tensor, gram: Tensor
    ) -> Tensor:
        ctx.save_for_backward(base, gain, projected, left, right, gram)
        return _row_squares(base, gain, projected, left, gram)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        base, gain, projected, left, right, gram = ctx.saved_tensors
        for_base, for_gain, for_projected, for_left, for_right, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            gram = wide(right) @ wide(right).mT  # with its graph
        U, twice = wide(left), 2 * grad[:, None]
        d_base = d_gain = d_projected = d_left = d_right = None
        if for_left:
            d_left = U @ gram if gain is None else torch.addcmul(U @ gram, gain[:, None], wide(projected))
            d_left = (twice * d_left).to(left.dtype)
        if for_right:
            d_right = (U.mT @ (twice * U) @ wide(right)).to(right.dtype)
        if for_projected and gain is not None:
            d_projected = (twice * gain[:, None] * U).to(projected.dtype)
        if for_gain:
            cross = (wide(projected) * U).sum(dim=1)
            d_gain = 2 * grad * (gain * base + cross)
            d_gain = d_gain if len(gain) == len(base) else d_gain.sum(dim=0, keepdim=True)
        if for_base and gain is not None:
            d_base = grad * gain.square()
        return d_base, d_gain, d_projected, d_left, d_right, None


class _SquaredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(matrix)
        return torch.cat([wide(block).square() @ weights for block in row_blocks(matrix)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, squared_columns(ctx.saved_tensors[0], grad)


class _SquaredColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(matrix)
        blocks = row_blocks(matrix)
        total = torch.zeros(matrix.shape[1], dtype=weights.dtype, device=weights.device)
        parts = weights.split([len(block) for block in blocks])  # type: ignore[no-untyped-call]
        for block, part in zip(blocks, parts, strict=True):
            total += part @ wide(block).square()
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, squared_rows(ctx.saved_tensors[0], grad)


class _SafeSqrt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        root = x.clamp_min(0).sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        positive = root > 0
        return torch.where(positive, grad / (2 * torch.where(positive, root, 1)), 0)
