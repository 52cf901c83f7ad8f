"""LoHa: an update that is the elementwise product of two low-rank ones."""

from collections.abc import Mapping
from typing import ClassVar

from einops import einsum, rearrange
from torch import Tensor

from adapterzoo.factored import FactoredWeight
from adapterzoo.methods.scaled import RankScaled
from adapterzoo.pieces import Parameters, Role
from adapterzoo.registry import register
from adapterzoo.site import Site


@register
class LoHa(RankScaled):
    """Low-rank Hadamard product adaptation (FedPara): ΔW = s · (W1_a W1_b) ∘ (W2_a W2_b), of a rank up to r².

    Shapes:
        W1_a: [out, r], W1_b: [r, in], W2_a: [out, r], kaiming uniform (a = √5) over their columns; W2_b: [r, in], zero.

    Args:
        r: rank of both factors, 1 ≤ r ≤ min(out, in).
        alpha: numerator of the scale s = alpha / r; r if not given.
        dropout: probability of dropping an input element on the way into the update, in training; 0 ≤ dropout < 1.

    Raises:
        SpecError: a field has a value out of its range.

    Example:
        >>> from adapterzoo import DoRA, LoHa
        >>> DoRA(LoHa(r=4))
        DoRA(LoHa(r=4))

    Source:
        Hyeon-Woo et al., arXiv 2108.06098 (FedPara), proposition 1; as an adapter: Yeh et al., arXiv 2309.14859; the
        start is PEFT's.

    Deviations:
        Applied as a pair of r² thin columns, not as a matrix. A kernel is a matrix here; the published codes also have
        a Tucker form of it. Dropout is the input's; theirs drops ranks or whole layers.
    """

    roles: ClassVar[Mapping[str, Role]] = {
        "W1_a": Role.OUTPUT_FACTOR, "W1_b": Role.INPUT_FACTOR,
        "W2_a": Role.OUTPUT_FACTOR, "W2_b": Role.INPUT_FACTOR,
    }  # fmt: skip

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """W2_b zero, the others random: the update starts at zero."""
        out, width, r = site.out_features, site.in_features, self.r
        return {
            "W1_a": site.kaiming_uniform("W1_a", out, r, fan=r),
            "W1_b": site.kaiming_uniform("W1_b", r, width, fan=site.fan_in),
            "W2_a": site.kaiming_uniform("W2_a", out, r, fan=r),
            "W2_b": site.zeros(r, width),
        }

    def update(self, params: Parameters, site: Site) -> FactoredWeight:
        """Columns U[:, (i, j)] = s W1_a[:, i] W2_a[:, j] and rows V[(i, j)] = W1_b[i] W2_b[j]: R = r²."""
        columns = einsum(self.scale * params.W1_a, params.W2_a, "out i, out j -> out i j")
        rows = einsum(params.W1_b, params.W2_b, "i cols, j cols -> i j cols")
        left, right = rearrange(columns, "out i j -> out (i j)"), rearrange(rows, "i j cols -> (i j) cols")
        return site.low_rank(left, right, dropout=self.dropout)

    def dense(self, params: Parameters, site: Site) -> Tensor:
        """S (W1_a W1_b) ∘ (W2_a W2_b)."""
        return self.scale * (params.W1_a @ params.W1_b) * (params.W2_a @ params.W2_b)
