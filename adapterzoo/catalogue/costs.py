"""What a forward costs: multiply-adds of its matrix products, counted on tensors without values: nothing is held."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from adapterzoo.base import WeightShape
from adapterzoo.layer import AdaptedLinear
from adapterzoo.pieces import Piece

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_FEW, _MORE = 16, 48
T = TypeVar("T")


class Cost(NamedTuple):
    """Multiply-adds of a forward of T tokens (of a convolution: output positions): T · token + call."""

    token: int
    """For every token."""
    call: int
    """Once, however many tokens there are: norms, rotations, whatever is made of the weights alone."""


def bare_layer(shape: WeightShape) -> nn.Module:
    """A layer without values, and without a bias."""
    if not shape.kernel:
        return nn.Linear(shape.in_features, shape.out_features, bias=False, device="meta")
    kind = _CONVOLUTIONS[len(shape.kernel)]
    layer: nn.Module = kind(shape.in_channels, shape.out_features, shape.kernel, bias=False, device="meta")
    return layer


def adapted(shape: WeightShape, spec: Piece) -> AdaptedLinear:
    """A layer without values, adapted.

    Raises:
        MisfitError: the spec does not fit that shape.
    """
    return AdaptedLinear(bare_layer(shape), spec)


def adapted_cost(layer: AdaptedLinear) -> Cost:
    """What a forward of an adapted layer costs, by running it on tensors that have no values.

    Args:
        layer: on the meta device; it is of no other use afterwards.

    Raises:
        Exception: whatever a piece raises that reads values of its tensors: it can't be counted so.
    """

    with FakeTensorMode(allow_non_fake_inputs=True):  # kernels ask for autocast, which the meta device does not know
        layer.to_empty(device="cpu")
        layer.refresh()
        weight, once = _counted(lambda: layer.adapter.weight(layer.site()))  # its own forward wants values
        cost = _cost(lambda x: layer.form.adapted(x, layer.weight, weight, None, 0.0, False), layer.weight)
    return Cost(cost.token, cost.call + once)


def bare_cost(layer: nn.Module) -> Cost:
    """What a forward of a layer on the meta device costs without an adapter."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return _cost(layer, weight)


def thin_columns(layer: AdaptedLinear) -> int:
    """How many thin columns the generator's update has, 0 if it is no thin product."""
    V = layer.adapter.generator.weight(layer.site()).V
    return 0 if V is None else V.value.shape[0]


def _cost(forward: Callable[[Tensor], Tensor], weight: Tensor) -> Cost:
    """From two numbers of tokens; of a convolution they are pictures of the kernel's size, one position each."""
    inputs = (weight.new_empty(tokens, *weight.shape[1:]) for tokens in (_FEW, _MORE))
    few, more = (_counted(partial(forward, x))[1] for x in inputs)
    token = (more - few) // (_MORE - _FEW)
    return Cost(token, few - _FEW * token)


def _counted(run: Callable[[], T]) -> tuple[T, int]:
    """What a function gives, and the multiply-adds that it took."""
    with FlopCounterMode(display=False, custom_mapping=_UNSEEN) as counter:
        made = run()
    return made, int(counter.get_total_flops()) // 2


def _products(out: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Operations of out + left @ right, of matrices or of stacks of them."""
    return 2 * torch.Size(left).numel() * right[-1]


def _by_vector(*shapes: Any, **_: Any) -> int:
    """Operations of a matrix times a vector: two for every element of the matrix, the first that has two axes."""
    return 2 * next(torch.Size(shape).numel() for shape in shapes if len(shape) == 2)


# What torch's counter misses: products in place, and those with vectors.
_UNSEEN: dict[Any, Any] = {
    **dict.fromkeys([torch.ops.aten.addmm_, torch.ops.aten.baddbmm_], _products),
    **dict.fromkeys([torch.ops.aten.mv, torch.ops.aten.addmv, torch.ops.aten.addmv_], _by_vector),
}
