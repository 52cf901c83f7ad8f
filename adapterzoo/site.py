"""What a piece may know of the layer it sits on: its weight, its shape, and random streams of its own."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from adapterzoo.base import Base, WeightShape
from adapterzoo.factored import FactoredWeight, RightFactor
from adapterzoo.streams import stream
from adapterzoo.terms import Kronecker, Structured
from adapterzoo.wide import safe_sqrt

LAYER_TYPES = frozenset({"linear", "convolution", "embedding"})
"""What a piece may sit on. Quantised layers, and those of Transformers that store Wᵀ, are linear ones."""


class Singular(NamedTuple):
    """Some singular triplets of W, in descending order: W ≈ U diag(S) Vᵀ, with all of them W itself."""

    U: Tensor
    """[out, r]."""
    S: Tensor
    """[r]."""
    Vt: Tensor
    """[r, in]."""


@dataclass(frozen=True)
class Site:
    """What a piece may know of the layer it sits on.

    Args:
        base: the frozen weight, through its calls.
        dtype: the dtype that factors are built in: the base's, but at least float32.
        layer: name of the layer in its model, "" if it stands alone.
        seed: the user's seed.
        depth: where the piece stands in the composition, counted from the generator (0).
        one_hot: whether the layer's inputs are one-hot vectors, as an embedding's are.
    """

    base: Base
    dtype: torch.dtype
    layer: str = ""
    seed: int = 0
    depth: int = 0
    one_hot: bool = False

    @property
    def shape(self) -> WeightShape:
        """(out, in) of W, and the kernel of a convolution, () for other layers."""
        return self.base.shape

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return self.base.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of W."""
        return self.base.shape[1]

    @property
    def fan_in(self) -> int:
        """How many inputs add up in an output: the columns of W, or 1 where inputs are one-hot."""
        return 1 if self.one_hot else self.in_features

    @property
    def device(self) -> torch.device:
        """Where the layer lives."""
        return self.base.device

    @property
    def layer_type(self) -> str:
        """One of `LAYER_TYPES`."""
        return "embedding" if self.one_hot else "convolution" if self.shape.kernel else "linear"

    def row_norms(self) -> Tensor:
        """‖w_i‖: [out]; equal, bit for bit, to FactoredWeight.row_norms() of a zero update."""
        return safe_sqrt(self.base.row_norms_sq()).to(self.dtype)

    def frobenius_norm(self) -> Tensor:
        """‖W‖_F: [1]."""
        return safe_sqrt(self.base.row_norms_sq().sum()[None]).to(self.dtype)

    def column_norms(self) -> Tensor:
        """‖W_:j‖ of the columns: [in]; equal, bit for bit, to FactoredWeight.column_norms() of a zero update."""
        return safe_sqrt(self.base.column_norms_sq()).to(self.dtype)

    def singular_triplets(self, r: int, smallest: bool = False) -> Singular:
        """The r largest singular triplets of W, or the r smallest, exactly: a whole decomposition, for `init` only.

        Signs are fixed, so that the same W gives the same triplets: the largest element of every row of Vᵀ is positive.
        """
        if self.base.device.type == "meta":
            return Singular(self.zeros(self.out_features, r), self.zeros(r), self.zeros(r, self.in_features))
        with torch.no_grad():
            U, S, Vt = torch.linalg.svd(self.base.dense().detach().to(self.dtype), full_matrices=False)
            own = slice(len(S) - r, None) if smallest else slice(r)
            U, S, Vt = U[:, own], S[own], Vt[own]
            signs = torch.take_along_dim(Vt, Vt.abs().argmax(dim=1, keepdim=True), dim=1).sign()
            return Singular((U * signs.mT).contiguous(), S.contiguous(), (Vt * signs).contiguous())

    def low_rank(
        self, U: Tensor, V: Tensor, dropout: float = 0.0, steps: tuple[Tensor, Tensor] | None = None
    ) -> FactoredWeight:
        """W + U V, with U: [out, r], V: [r, in] and a dropout probability for the input of V.

        Args:
            U: left factor.
            V: right factor.
            dropout: probability of dropping an input element on the way into V, in training.
            steps: on a convolution, V as a kernel [r, k, *kernel] after a map of the channels [k, in/groups], which
                is cheaper to apply: V is their product.
        """
        right = RightFactor(self.base, V, steps)
        return FactoredWeight(self.base, U=U, V=right, drop_rows=V.shape[0], dropout=dropout)

    def dense_update(self, D: Tensor) -> FactoredWeight:
        """W + D, with a dense D: [out, in]: for pieces without structure; costs what full fine-tuning costs."""
        return FactoredWeight(self.base, remainder=D)

    def kronecker(self, left: Tensor, right: Tensor) -> FactoredWeight:
        """W + L ⊗ R, with L: [a, c], R: [b, d], a b = out and c d = in; applied without forming the product."""
        return FactoredWeight(self.base, structured=(Structured(Kronecker(left, right)),))

    def unchanged(self) -> FactoredWeight:
        """W itself, for a piece that proposes no update."""
        return FactoredWeight(self.base)

    # Initial values. Every parameter has its own random stream, keyed by (seed, layer, depth, parameter) and drawn in
    # float32 on the CPU: a generator starts equal under every wrapper, dtype and device, and the global generator is
    # left alone.

    def zeros(self, *shape: int) -> Tensor:
        """A tensor of zeros."""
        return torch.zeros(shape, dtype=self.dtype, device=self.base.device)

    def ones(self, *shape: int) -> Tensor:
        """A tensor of ones."""
        return torch.ones(shape, dtype=self.dtype, device=self.base.device)

    def normal(self, parameter: str, *shape: int, std: float) -> Tensor:
        """Draw from N(0, std²), from the parameter's own stream."""
        return self._draw(parameter, shape, lambda draw, stream: draw.normal_(0.0, std, generator=stream))

    def uniform(self, parameter: str, *shape: int, bound: float) -> Tensor:
        """Draw from U(−bound, bound), from the parameter's own stream."""
        return self._draw(parameter, shape, lambda draw, stream: draw.uniform_(-bound, bound, generator=stream))

    def shared_uniform(self, name: str, rows: int, columns: int, bound: float) -> Tensor:
        """Draw [rows, columns] from U(−bound, bound), the same for every layer with this seed.

        Fewer rows are the first of more. Layers whose tensors are equal hold one, if the piece declares it `shared`.

        Args:
            name: of the stream; that of the piece belongs in it.
            rows: of the tensor.
            columns: of the tensor.
            bound: largest size of a number.
        """
        own = replace(self, layer="", depth=0)
        return own.uniform(f"shared {name} of {columns}", rows, columns, bound=1.0) * bound

    def kaiming_uniform(self, parameter: str, *shape: int, fan: int) -> Tensor:
        """Draw as torch.nn.init.kaiming_uniform_(a=√5) does: U(−1/√fan, 1/√fan)."""
        return self.uniform(parameter, *shape, bound=1 / math.sqrt(max(fan, 1)))

    def _draw(
        self, parameter: str, shape: tuple[int, ...], fill: Callable[[Tensor, torch.Generator], Tensor]
    ) -> Tensor:
        if self.base.device.type == "meta":
            return self.zeros(*shape)
        draw = fill(torch.empty(shape, dtype=torch.float32, device="cpu"), self._stream(parameter))
        return draw.to(self.base.device, self.dtype)

    def _stream(self, parameter: str) -> torch.Generator:
        return stream(self.seed, self.layer, self.depth, parameter)
