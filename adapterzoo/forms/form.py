"""What differs between kinds of layers: how they store their weight W, and how they apply it."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adapterzoo.base import Base, DenseBase, WeightShape
from adapterzoo.factored import FactoredWeight
from adapterzoo.kept import NormCache

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that an ordinary weight may have."""


class Form(ABC):
    """The form of one layer: its weight as a matrix W: [out, in] and back, and the layer's own way to apply a weight.

    Everything else, from norms to merging, acts on the matrix and is the same for every layer. Abstract.

    Args:
        module: the plain layer.
    """

    kind: ClassVar[str]
    """One or two words for it, in messages and files."""

    is_linear: ClassVar[bool] = True
    """Whether the target "all-linear" means it."""

    one_hot: ClassVar[bool] = False
    """Whether its inputs are indices, that is, one-hot vectors."""

    token_wise: ClassVar[bool] = True
    """Whether it maps every token by itself, so that nested batches can be taken apart."""

    is_dense: ClassVar[bool] = True
    """Whether the weight is an ordinary tensor, which can hold W'; a quantised one can't."""

    keeps_state: ClassVar[bool] = False
    """Whether its modules have buffers, or hooks on their files, of their own."""

    shape: WeightShape
    """(out, in) of W, and the kernel of a convolution: as they were when the layer was adapted."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.shape = self._shape()

    @property
    def layer_type(self) -> str:
        """What the layer is to a piece: "linear", "convolution" or "embedding"."""
        return "embedding" if self.one_hot else "convolution" if self.shape.kernel else "linear"

    @classmethod
    @abstractmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether a module is of this kind."""

    @classmethod
    def problem(cls, module: nn.Module) -> str | None:
        """Say why a module of this kind can't be adapted; None if it can."""
        return odd_weight(module)

    @abstractmethod
    def _shape(self) -> WeightShape:
        """(out, in) of W, and the kernel of a convolution."""

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """From the layer's layout to W: [out, in]; a view where it can be one."""

    @abstractmethod
    def stored(self, matrix: Tensor) -> Tensor:
        """From a matrix [out, in] to the layer's layout."""

    def released(self) -> nn.Module:
        """The plain layer, with the parameters as they are now."""
        return self.module

    def base(self, weight: Tensor, norms: NormCache) -> Base:
        """The calls, for a weight in the layer's layout."""
        return DenseBase(weight, norms, self.matrix, self.shape)

    @abstractmethod
    def bad_input(self, x: Tensor, weight: Tensor) -> str | None:
        """Say what is wrong with an input, as the end of a sentence about the layer; None if nothing is."""

    @abstractmethod
    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own forward, on that weight in its own layout."""

    @abstractmethod
    def adapted(
        self, x: Tensor, stored: Tensor, weight: FactoredWeight, bias: Tensor | None, dropout: float, lean: bool
    ) -> Tensor:
        """The layer's forward on W' in normal form.

        Args:
            x: input.
            stored: W in the layer's own layout.
            weight: W'.
            bias: the layer's own bias: added once, never scaled or rotated.
            dropout: probability of dropping an input element on the way into the generator's rows of V, 0 in
                evaluation.
            lean: see AdaptedLinear.
        """


def odd_weight(module: nn.Module) -> str | None:
    """Say that a module's weight is no ordinary floating-point parameter; None if it is one."""
    weight: Any = module.weight
    if type(weight) is nn.Parameter and weight.dtype in DTYPES:
        return None
    return f"its weight is a {type(weight).__name__} of {weight.dtype}, not an ordinary matrix"


def wrong_dtype(x: Tensor, weight: Tensor) -> str | None:
    """What `bad_input` says of an input that has another dtype than the weight, outside autocast."""
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return None
    return f"has a weight of {weight.dtype} and got an input of {x.dtype}: cast one, or use autocast"
