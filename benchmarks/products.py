"""Matrix products that torch's counter of operations misses: in place, with vectors, with an activation fused in."""

from typing import Any

import torch

aten = torch.ops.aten
Shape = tuple[int, ...]


def _addmm(out: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _baddbmm(out: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * left[2] * right[2]


def _mv(matrix: Shape, vector: Shape, *_: Any, **__: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _addmv(out: Shape, matrix: Shape, vector: Shape, *_: Any, **__: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _dot(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * left[0]


def _addr(out: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * left[0] * right[0]


MISSED: dict[Any, Any] = {
    **dict.fromkeys([aten.addmm_, aten._addmm_activation], _addmm),
    **dict.fromkeys([aten.baddbmm_, aten.addbmm, aten.addbmm_], _baddbmm),
    aten.mv: _mv,
    **dict.fromkeys([aten.addmv, aten.addmv_], _addmv),
    aten.dot: _dot,
    **dict.fromkeys([aten.addr, aten.addr_], _addr),
}
