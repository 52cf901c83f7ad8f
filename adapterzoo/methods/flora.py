"""FLoRA: an update in Tucker form."""

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

from einops import einsum
from pydantic import Field, field_validator
from torch import Tensor

from adapterzoo.factored import FactoredWeight
from adapterzoo.pieces import Generator, Parameters, Role, Site
from adapterzoo.registry import register

_Rank = Annotated[int, Field(ge=1)]


@register
class FLoRA(Generator):
    """Low-rank adaptation in Tucker form, for a linear layer: ΔW = scale · A core B.

    Shapes:
        A: [out, r_out], core: [r_out, r_in], B: [r_in, in]; A and B kaiming normal (a = √3) over their rank, core zero.

    Args:
        r: the rank of both modes, or (r_out, r_in); 1 ≤ r_out ≤ out, 1 ≤ r_in ≤ in.
        scale: factor of the update.
        dropout: probability of dropping an input element on the way into B, in training; 0 ≤ dropout < 1.

    Raises:
        SpecError: a field has a value out of its range.

    Example:
        >>> from adapterzoo import FLoRA
        >>> FLoRA(r=(8, 4)).ranks
        (8, 4)

    Source:
        Si et al., arXiv 2405.14739, the matrix case of its Tucker form.

    Deviations:
        Here A writes the output and B reads the input, as in the paper's ΔW = A G B. The authors' two other code
        bases draw A and B from other distributions (N(0, 0.02²); kaiming uniform) and divide by a rank.
    """

    roles: ClassVar[Mapping[str, Role]] = {"A": Role.OUTPUT_FACTOR, "core": Role.CORE, "B": Role.INPUT_FACTOR}

    always_shown: ClassVar[frozenset[str]] = frozenset({"r"})

    r: _Rank | tuple[_Rank, _Rank] = Field(default=8, description="a whole number ≥ 1, or a tuple (r_out, r_in) of two")
    scale: float = Field(default=1.0, gt=0, description="a finite number > 0")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="a number with 0 ≤ dropout < 1")

    @field_validator("r", mode="after")
    @classmethod
    def _one_rank_for_both(cls, r: int | tuple[int, int]) -> int | tuple[int, int]:
        """Resolve (8, 8) to 8: they are the same spec."""
        return r[0] if isinstance(r, tuple) and r[0] == r[1] else r

    @property
    def ranks(self) -> tuple[int, int]:
        """(r_out, r_in)."""
        return self.r if isinstance(self.r, tuple) else (self.r, self.r)

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """1 ≤ r_out ≤ out and 1 ≤ r_in ≤ in."""
        for mode, rank, size in zip(("out", "in"), self.ranks, (out_features, in_features), strict=True):
            if rank > size:
                return f"r_{mode}={rank} is above {mode} = {size}"
        return None

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """A and B random, the core zero: the update starts at zero."""
        r_out, r_in = self.ranks
        return {
            "A": site.normal("A", site.out_features, r_out, std=math.sqrt(0.5 / r_out)),
            "core": site.zeros(r_out, r_in),
            "B": site.normal("B", r_in, site.in_features, std=math.sqrt(0.5 / r_in)),
        }

    def update(self, params: Parameters, site: Site) -> FactoredWeight:
        """U = A, V = scale core B; or U = A scale core, V = B where r_in < r_out: the rank is the smaller of both."""
        core = self.scale * params.core
        if core.shape[0] <= core.shape[1]:
            rows = einsum(core, params.B, "r_out r_in, r_in cols -> r_out cols")
            return site.low_rank(params.A, rows, dropout=self.dropout)
        columns = einsum(params.A, core, "rows r_out, r_out r_in -> rows r_in")
        return site.low_rank(columns, params.B, dropout=self.dropout)
