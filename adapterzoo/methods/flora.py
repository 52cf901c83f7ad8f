"""FLoRA: an update in Tucker form."""

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from einops import einsum
from pydantic import Field, field_validator
from torch import Tensor

from adapterzoo.base import WeightShape
from adapterzoo.factored import FactoredWeight
from adapterzoo.pieces import Generator, Parameters, Role
from adapterzoo.registry import register
from adapterzoo.site import Site

_Rank = Annotated[int, Field(ge=1)]
_Ranks = Annotated[tuple[_Rank, ...], Field(min_length=2, max_length=5)]
_KERNEL_MODES = ("K1", "K2", "K3")


@register
class FLoRA(Generator):
    """Low-rank adaptation in Tucker form: ΔW = scale · A core B, or of a convolution's whole kernel:

        ΔW[o, i, h, w] = scale · Σ_abcd core[a, b, c, d] A[o, a] B[b, i] K1[c, h] K2[d, w]

    A convolution applies it in three steps: B as a 1×1 convolution, the core expanded to the kernel, A as a 1×1
    convolution. Where r says nothing of the kernel's modes they are left whole, and core: [r_out, r_in, *kernel].

    Shapes:
        A: [out, r_out]; core: [r_out, r_in, ...], zero; B: [r_in, in], or [r_in, in/groups] on a convolution; K1, K2,
        K3: [rank, size], one for each dimension of the kernel, if r has ranks for them. All but the core: kaiming
        normal (a = √3) over their rank.

    Args:
        r: the rank of both channel modes; (r_out, r_in); or (r_out, r_in, r_kh, r_kw) with a rank for each dimension
            of a kernel. No rank is above its mode, and r_in counts on in/groups.
        scale: factor of the update.
        dropout: probability of dropping an input element on the way into B, in training; 0 ≤ dropout < 1.

    Raises:
        SpecError: a field has a value out of its range.

    Example:
        >>> from adapterzoo import FLoRA
        >>> FLoRA(r=(8, 4)).ranks
        (8, 4)

    Source:
        Si et al., arXiv 2405.14739: the Tucker form of tensors of any order, and its matrix case.

    Deviations:
        The published code needs a rank for every mode, counts r_in on all inputs, so that it fails on grouped
        convolutions, and forms ΔW. The authors' two other code bases draw A and B from other distributions.
    """

    roles: ClassVar[Mapping[str, Role]] = {
        "A": Role.OUTPUT_FACTOR,
        "core": Role.CORE,
        "B": Role.INPUT_FACTOR,
        **dict.fromkeys(_KERNEL_MODES, Role.INPUT_FACTOR),
    }
    optional: ClassVar[frozenset[str]] = frozenset(_KERNEL_MODES)

    always_shown: ClassVar[frozenset[str]] = frozenset({"r"})

    r: _Rank | _Ranks = Field(
        default=8, description="a whole number ≥ 1, a tuple (r_out, r_in), or (r_out, r_in, r_kh, r_kw) for a Conv2d"
    )
    scale: float = Field(default=1.0, gt=0, description="a finite number > 0")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="a number with 0 ≤ dropout < 1")

    @field_validator("r", mode="after")
    @classmethod
    def _one_rank_for_both(cls, r: int | tuple[int, ...]) -> int | tuple[int, ...]:
        """Resolve (8, 8) to 8: they are the same spec."""
        return r[0] if isinstance(r, tuple) and len(r) == 2 and r[0] == r[1] else r

    @property
    def ranks(self) -> tuple[int, ...]:
        """(r_out, r_in), and those of the kernel's modes if there are any."""
        return self.r if isinstance(self.r, tuple) else (self.r, self.r)

    def misfit(self, shape: WeightShape) -> str | None:
        """1 ≤ rank ≤ size in every mode."""
        modes = {"out": shape.out_features, "in/groups" if shape.kernel else "in": shape.in_channels}
        modes.update(zip(("kd", "kh", "kw")[3 - len(shape.kernel) :], shape.kernel, strict=True))
        if len(self.ranks) not in (2, len(modes)):
            sizes = ", ".join(f"{mode} = {size}" for mode, size in modes.items())
            return f"r={self.r} has {len(self.ranks)} ranks, and the weight {len(modes)} modes: {sizes}"
        for rank, (mode, size) in zip(self.ranks, modes.items(), strict=False):
            if rank > size:
                return f"r_{mode.split('/')[0]}={rank} is above {mode} = {size}"
        return None

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """The factors random, the core zero: the update starts at zero."""
        r_out, r_in, *r_kernel = self.ranks
        kernel = site.shape.kernel
        modes = zip(_KERNEL_MODES, r_kernel, kernel, strict=False)
        return {
            "A": site.normal("A", site.out_features, r_out, std=math.sqrt(0.5 / r_out)),
            "core": site.zeros(r_out, r_in, *(r_kernel or kernel)),
            "B": site.normal("B", r_in, site.shape.in_channels, std=math.sqrt(0.5 / r_in)),
            **{name: site.normal(name, rank, size, std=math.sqrt(0.5 / rank)) for name, rank, size in modes},
        }

    def update(self, params: Parameters, site: Site) -> FactoredWeight:
        """U = A, V = scale core B, or U = A scale core, V = B if that is thinner; a convolution: V in two steps."""
        core = self.scale * params.core
        if site.shape.kernel:
            for name in _KERNEL_MODES[: len(self.ranks) - 2]:
                core = torch.tensordot(core, getattr(params, name), dims=([2], [0]))  # the next mode moves to the end
            rows = torch.tensordot(core, params.B, dims=([1], [0])).movedim(-1, 1).flatten(1)
            return site.low_rank(params.A, rows, dropout=self.dropout, steps=(core, params.B))
        if core.shape[0] <= core.shape[1]:
            rows = einsum(core, params.B, "r_out r_in, r_in cols -> r_out cols")
            return site.low_rank(params.A, rows, dropout=self.dropout)
        columns = einsum(params.A, core, "rows r_out, r_out r_in -> rows r_in")
        return site.low_rank(columns, params.B, dropout=self.dropout)

    def dense(self, params: Parameters, site: Site) -> Tensor:
        """Every mode of scale · core times its factor."""
        kernel = self.scale * params.core
        factors = [params.A.mT, params.B, *(getattr(params, name) for name in _KERNEL_MODES if name in params)]
        for mode, factor in enumerate(factors):
            kernel = torch.tensordot(kernel, factor, dims=([mode], [0])).movedim(-1, mode)
        return kernel.flatten(1)
