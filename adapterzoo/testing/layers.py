"""The kinds of layers that checks run on, and small shapes for each."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_TOKENS = 6


class Place(NamedTuple):
    """Which layer: the fields of a `Case` that say so, but for its kind."""

    shape: tuple[int, ...]
    bias: bool = True
    stride: int = 1
    padding: int = 0
    groups: int = 1


def _as_it_is(layer: nn.Module) -> nn.Module:
    return layer


@dataclass(frozen=True)
class LayerKind:
    """How to build a layer and its inputs.

    Args:
        layer_type: what it is to a piece.
        build: makes the layer, with any values, on the CPU.
        inputs: makes a batch of a place.
        shapes: small shapes of its weight, as `Case` takes them.
        large: shapes for what fits none of these.
        options: other fields of a case that suit each shape.
        finish: what is done to the layer once it has its values.
        stores_transposed: whether it stores Wᵀ.
        package: what has to be installed for it.
        exact: whether its weight is an ordinary one, of any dtype.
    """

    layer_type: str
    build: Callable[[Place], nn.Module]
    inputs: Callable[[Place, torch.Generator], Tensor]
    shapes: tuple[tuple[int, ...], ...]
    large: tuple[tuple[int, ...], ...]
    options: tuple[Mapping[str, Any], ...] = ({},)
    finish: Callable[[nn.Module], nn.Module] = _as_it_is
    stores_transposed: bool = False
    package: str = "torch"
    exact: bool = True

    @property
    def is_there(self) -> bool:
        """Whether the package that it needs is installed."""
        return find_spec(self.package) is not None


def _linear(place: Place) -> nn.Module:
    return nn.Linear(place.shape[1], place.shape[0], place.bias)


def _transposed(place: Place) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    made: nn.Module = Conv1D(place.shape[0], place.shape[1])
    return made


def _convolution(place: Place) -> nn.Module:
    out, channels, *kernel = place.shape
    own: dict[str, Any] = {"stride": place.stride, "padding": place.padding, "groups": place.groups, "bias": place.bias}
    return nn.Conv2d(channels * place.groups, out, (kernel[0], kernel[1]), **own)


def _embedding(place: Place) -> nn.Module:
    return nn.Embedding(place.shape[1], place.shape[0])


def _quantise(layer: nn.Module) -> nn.Module:
    with _quiet():
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(layer, Int8WeightOnlyConfig())
    return layer


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torchao logs of itself when it is imported."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _vectors(place: Place, draw: torch.Generator) -> Tensor:
    return torch.randn(2, _TOKENS, place.shape[1], generator=draw, dtype=torch.float64)


def _images(place: Place, draw: torch.Generator) -> Tensor:
    channels = place.shape[1] * place.groups
    return torch.randn(2, channels, 5, 4, generator=draw, dtype=torch.float64)


def _tokens(place: Place, draw: torch.Generator) -> Tensor:
    return torch.randint(place.shape[1], (2, _TOKENS), generator=draw)


_MATRICES = ((6, 4), (4, 7), (8, 6), (5, 3), (3, 8), (1, 5), (5, 1), (9, 6))
_KERNELS = ((6, 4, 3, 2), (4, 3, 1, 1), (6, 2, 2, 2), (5, 1, 2, 3), (10, 4, 1, 2))
_LARGE_MATRICES, _LARGE_KERNELS = ((12, 20), (24, 16)), ((16, 12, 3, 2), (12, 10, 1, 2))
_KERNEL_OPTIONS: tuple[Mapping[str, Any], ...] = (
    {},
    {"bias": False, "stride": 2, "padding": 1},
    {"groups": 2, "padding": 1},
    {"stride": 2},
    {"groups": 2, "bias": False},
)

LAYERS: dict[str, LayerKind] = {
    "linear": LayerKind("linear", _linear, _vectors, _MATRICES, _LARGE_MATRICES, ({}, {"bias": False})),
    "transposed": LayerKind(
        "linear", _transposed, _vectors, _MATRICES, _LARGE_MATRICES, stores_transposed=True, package="transformers"
    ),
    "convolution": LayerKind("convolution", _convolution, _images, _KERNELS, _LARGE_KERNELS, _KERNEL_OPTIONS),
    "embedding": LayerKind("embedding", _embedding, _tokens, _MATRICES, _LARGE_MATRICES, stores_transposed=True),
    "quantised": LayerKind(
        "linear", _linear, _vectors, ((16, 32), (32, 16)), ((32, 64),), ({}, {"bias": False}), _quantise,
        package="torchao", exact=False,
    ),
}  # fmt: skip
"""Every kind by the name that a case gives it."""
