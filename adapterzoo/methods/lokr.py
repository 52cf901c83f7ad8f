"""LoKr: an update that is a Kronecker product of two small matrices."""

from collections.abc import Mapping
from math import isqrt, prod
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from adapterzoo.base import WeightShape
from adapterzoo.factored import FactoredWeight
from adapterzoo.pieces import Generator, Parameters, Role
from adapterzoo.registry import register
from adapterzoo.site import Site


class _Sizes(NamedTuple):
    """W1: [a, c] and W2: [b, d], with a b = out and c d = in."""

    a: int
    b: int
    c: int
    d: int
    channels: int  # d without the elements of a convolution's kernel


@register
class LoKr(Generator):
    """Low-rank Kronecker adaptation: ΔW = s · W1 ⊗ W2 with s = alpha / r.

    out = a b and in = c d are split most equally, the smaller factor first. W2 = W2_a W2_b where r is below half of its
    larger side, else a whole matrix; W1 likewise if `decompose_both`. ΔW is never formed to be applied.

    Shapes:
        W1: [a, c], zero; W2: [b, d], kaiming uniform (a = √5) over d. Or W1_a: [a, r], zero, with W1_b: [r, c]; and
        W2_a: [b, r] with W2_b: [r, d]; kaiming uniform over their columns. Of a convolution the channels in/groups are
        split, and d counts the elements of the kernel.

    Args:
        r: rank of the factors that are products, ≥ 1.
        alpha: numerator of the scale; r if not given.
        factor: a and c, in the place of the most equal split; a divisor of out and of in (in/groups).
        decompose_both: make W1 a product too, where r is below half of its larger side.

    Raises:
        SpecError: a field has a value out of its range.

    Example:
        >>> from adapterzoo import MAP, LoKr
        >>> MAP(LoKr(r=4, factor=8))
        MAP(LoKr(r=4, factor=8))

    Source:
        Yeh et al., arXiv 2309.14859 (LyCORIS), the Kronecker adapters of arXiv 2212.10650; the split and the start are
        PEFT's.

    Deviations:
        The scale is alpha / r also where both factors are whole, as in PEFT; LyCORIS takes 1 there. A factor that does
        not divide is an error; both codes take another one instead. No dropout: theirs drop ranks or whole layers.
    """

    roles: ClassVar[Mapping[str, Role]] = {
        "W1": Role.CORE, "W1_a": Role.CORE, "W1_b": Role.CORE,
        "W2": Role.UPDATE, "W2_a": Role.OUTPUT_FACTOR, "W2_b": Role.INPUT_FACTOR,
    }  # fmt: skip
    optional: ClassVar[frozenset[str]] = frozenset(roles)
    always_shown: ClassVar[frozenset[str]] = frozenset({"r"})

    r: int = Field(default=8, ge=1, description="a whole number ≥ 1")
    alpha: float | None = Field(default=None, gt=0, description="a finite number > 0, or None for r")
    factor: int | None = Field(default=None, ge=1, description="a whole number ≥ 1, or None")
    decompose_both: bool = Field(default=False, description="True or False")

    def misfit(self, shape: WeightShape) -> str | None:
        """The factor divides out and in."""
        for what, size in (("out", shape.out_features), ("in/groups" if shape.kernel else "in", shape.in_channels)):
            if self.factor is not None and size % self.factor:
                return f"factor={self.factor} does not divide {what} = {size}"
        return None

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """W1 zero, W2 random: the update starts at zero."""
        size, r = self._sizes(site.shape), self.r
        made: dict[str, Tensor] = {}
        if self.decompose_both and 2 * r < max(size.a, size.c):
            made |= {"W1_a": site.zeros(size.a, r), "W1_b": site.kaiming_uniform("W1_b", r, size.c, fan=size.c)}
        else:
            made |= {"W1": site.zeros(size.a, size.c)}
        if 2 * r < max(size.b, size.channels):
            made |= {"W2_a": site.kaiming_uniform("W2_a", size.b, r, fan=r)}
            made |= {"W2_b": site.kaiming_uniform("W2_b", r, size.d, fan=size.d)}
        else:
            made |= {"W2": site.kaiming_uniform("W2", size.b, size.d, fan=size.d)}
        return made

    def update(self, params: Parameters, site: Site) -> FactoredWeight:
        """W + (s W1) ⊗ W2."""
        return site.kronecker(*self._factors(params))

    def dense(self, params: Parameters, site: Site) -> Tensor:
        """S · W1 ⊗ W2, block by block: block (i, j) is s W1[i, j] W2."""
        left, right = self._factors(params)
        return torch.cat([torch.cat([element * right for element in row], dim=1) for row in left])

    def _factors(self, params: Parameters) -> tuple[Tensor, Tensor]:
        """S W1: [a, c] and W2: [b, d]."""
        scale = (self.alpha or self.r) / self.r
        left = params.W1 if "W1" in params else params.W1_a @ params.W1_b
        return scale * left, params.W2 if "W2" in params else params.W2_a @ params.W2_b

    def _sizes(self, shape: WeightShape) -> _Sizes:
        a, c = (self.factor or _smaller(size) for size in (shape.out_features, shape.in_channels))
        channels = shape.in_channels // c
        return _Sizes(a, shape.out_features // a, c, channels * prod(shape.kernel), channels)


def _smaller(size: int) -> int:
    """The smaller factor of the most equal split of a number."""
    return next(d for d in range(isqrt(size), 0, -1) if size % d == 0)
