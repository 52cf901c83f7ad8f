"""Embeddings: W: [embedding_dim, num_embeddings], applied to one-hot vectors that are never formed."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterzoo.base import WeightShape, own_forward
from adapterzoo.factored import FactoredWeight
from adapterzoo.forms.form import Form


class Embedding(Form):
    """nn.Embedding: the vector of token t is column t of W', W'_t = (1 + δ) ∘ W_t + U V_t + D_t.

    Dropout drops whole tokens on the way into V, with the one element of their one-hot vectors. Tokens with the
    padding_idx train nothing, but their vector is a column of W' like any other.
    """

    kind: ClassVar[str] = "embedding"
    is_linear: ClassVar[bool] = False
    one_hot: ClassVar[bool] = True

    module: nn.Embedding

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether it is an nn.Embedding."""
        return isinstance(module, nn.Embedding)

    @classmethod
    def problem(cls, module: nn.Module) -> str | None:
        """It needs torch's own forward, an ordinary weight, and none of the options that act on a trained weight."""
        assert isinstance(module, nn.Embedding)
        other = own_forward(module, nn.Embedding)
        if other is not None:
            return other
        if module.max_norm is not None:
            return (
                f"max_norm={module.max_norm} rescales its weight in every forward, which an adapter can't follow; "
                "build it without"
            )
        for option in ("scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                return f"{option}=True is about gradients of its weight, which is frozen; build it with {option}=False"
        return super().problem(module)

    def _shape(self) -> WeightShape:
        """(embedding_dim, num_embeddings)."""
        entries, dimensions = self.module.weight.shape
        return WeightShape(dimensions, entries)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight transposed."""
        return weight.mT

    def stored(self, matrix: Tensor) -> Tensor:
        """The matrix transposed."""
        return matrix.mT

    def bad_input(self, x: Tensor, weight: Tensor) -> str | None:
        """Inputs are indices."""
        if x.dtype in (torch.int64, torch.int32):
            return None
        return f"takes indices (torch.long or torch.int); got {x.dtype}"

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The vectors of tokens: [...] -> [..., embedding_dim]."""
        return F.embedding(x, weight, self.module.padding_idx)

    def adapted(
        self, x: Tensor, stored: Tensor, weight: FactoredWeight, bias: Tensor | None, dropout: float, lean: bool
    ) -> Tensor:
        """The vectors of tokens under W': [...] -> [..., embedding_dim], rounded once; `lean` is nothing here."""
        z = self.plain(x, stored, None)
        with torch.autocast(x.device.type, enabled=False):
            y = z
            if weight.delta is not None:
                y = z * (1 + weight.delta)
            if weight.U is not None and weight.V is not None:
                y = y + self._project(x, weight, weight.V.value, dropout) @ weight.U.mT
            rest = weight.dense_terms()
            if rest is not None:
                y = y + F.embedding(x, rest.mT)
            if self.module.padding_idx is not None:  # its tokens train nothing, as in the plain layer
                y = torch.where((x == self.module.padding_idx)[..., None], y.detach(), y)
            return y.to(z.dtype)

    def _project(self, x: Tensor, weight: FactoredWeight, V: Tensor, dropout: float) -> Tensor:
        """H = V_t: [..., R]; where dropout acts, the generator's own columns with some tokens dropped."""
        h = F.embedding(x, V.mT)
        if not dropout or not weight.drop_rows:
            return h
        keep = (torch.rand(x.shape, device=x.device) >= dropout).to(h.dtype)[..., None] / (1 - dropout)
        own = torch.arange(h.shape[-1], device=x.device) < weight.drop_rows
        return torch.where(own, h * keep, h)
