"""VeRA: trained vectors between frozen random matrices that layers share."""

import math
from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from adapterzoo.factored import FactoredWeight
from adapterzoo.pieces import Generator, Parameters, Role
from adapterzoo.registry import register
from adapterzoo.site import Site


@register
class VeRA(Generator):
    """Vector-based random matrix adaptation: ΔW = diag(b) B diag(d) A, with A and B random, frozen and shared.

    Layers with the same seed and the same width share A, those with as many outputs share B: in memory and in files
    each stands once.

    Shapes:
        d: [r], d_initial; b: [out], zero; buffers A: [r, in], uniform in ±√(6 / in); B: [out, r], uniform in ±√(6 / r).

    Args:
        r: rank of the random matrices; it may be above out and in.
        d_initial: what d starts at.
        dropout: probability of dropping an input element on the way into A, in training; 0 ≤ dropout < 1.

    Raises:
        SpecError: a field has a value out of its range.

    Example:
        >>> from adapterzoo import DoRA, VeRA
        >>> DoRA(VeRA(r=64))
        DoRA(VeRA(r=64))

    Source:
        Kopiczko et al., arXiv 2310.11454, eq. 2; the start is that of PEFT.

    Deviations:
        A is drawn for the layer's own width. PEFT draws one matrix for the widest layer, and the others take a part of
        it, so that their A is smaller by √(widest / in). There is no scale, as in the paper.
    """

    roles: ClassVar[Mapping[str, Role]] = {
        "d": Role.CORE, "b": Role.OUTPUT_FACTOR, "A": Role.BUFFER, "B": Role.BUFFER,
    }  # fmt: skip
    shared: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    always_shown: ClassVar[frozenset[str]] = frozenset({"r"})

    r: int = Field(default=256, ge=1, description="a whole number ≥ 1")
    d_initial: float = Field(default=0.1, description="a finite number")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="a number with 0 ≤ dropout < 1")

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """d constant, b zero: the update starts at zero."""
        rows = site.shared_uniform("VeRA.A", site.in_features, self.r, bound=math.sqrt(6 / site.fan_in))
        return {
            "d": self.d_initial * site.ones(self.r),
            "b": site.zeros(site.out_features),
            "A": rows.mT.contiguous(),
            "B": site.shared_uniform("VeRA.B", site.out_features, self.r, bound=math.sqrt(6 / self.r)),
        }

    def update(self, params: Parameters, site: Site) -> FactoredWeight:
        """U = diag(b) B diag(d), V = A."""
        return site.low_rank(params.b[:, None] * params.B * params.d, params.A, dropout=self.dropout)

    def dense(self, params: Parameters, site: Site) -> Tensor:
        """diag(b) B diag(d) A."""
        return params.b.diag() @ params.B @ params.d.diag() @ params.A
