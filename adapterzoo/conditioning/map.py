"""MAP: two trained lengths, one for the base and one for the update, taken as vectors; or two for every row."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adapterzoo.factored import FactoredWeight
from adapterzoo.pieces import Parameters, Promise, Role, Wrapper
from adapterzoo.registry import register
from adapterzoo.site import Site
from adapterzoo.wide import wide

_LITERAL_FLOOR = 1e-6


@register
class MAP(Wrapper):
    """Magnitude and direction of whole matrices: W' = α W / ‖W‖_F + β Δ / ‖Δ‖_F, with Δ = W_inner − W.

    At the start Δ = 0, and the paper does not say what 0 / 0 is. Here ‖Δ‖_F has a floor of ε‖W‖_F: below it MAP is the
    linear gain β / (ε‖W‖_F), so the start is exact and its gradient finite; above it the equation holds exactly.

    Per channel the same holds for every row by itself, a filter of a convolution: w'_o = α_o w_o / ‖w_o‖ +
    β_o Δ_o / ‖Δ_o‖. So the question whether flattening a kernel to one vector hurts can be asked.

    Shapes:
        alpha (α): [1], ‖W‖_F; beta (β): [1], one. Per channel: [out], ‖w_o‖; [out], one.

    Args:
        inner: the generator or wrapper whose update is Δ.
        per: "matrix", the paper's, or "channel".
        floor: ε > 0; or "literal" for the paper's start, an absolute floor of 1e-6.

    Raises:
        SpecError: floor is not a positive number or "literal", or per is none of its two.

    Example:
        >>> from adapterzoo import MAP, AdaLoRA
        >>> MAP(AdaLoRA(r=16), floor="literal")
        MAP(AdaLoRA(r=16), floor='literal')

    Source:
        arXiv 2505.23094, eq. 4; α = ‖W‖_F and β = 1 at the start, both trained jointly with Δ.

    Deviations:
        The floor. With an absolute floor of 1e-6 the first gradient is about 1e6 times LoRA's, and plain AdamW stays
        stuck (docs/pieces/map.md shows both). If W = 0 the base term is left as it is and the floor is ε itself; so too
        for a zero row per channel, which is no form of the paper's.
    """

    roles: ClassVar[Mapping[str, Role]] = {"alpha": Role.MAGNITUDE, "beta": Role.MAGNITUDE}

    floor: Annotated[float, Field(gt=0)] | Literal["literal"] = Field(
        default=1e-2, description='a finite number > 0, or "literal"'
    )

    per: Literal["matrix", "channel"] = Field(default="matrix", description="'matrix' or 'channel'")

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """α = ‖W‖_F, β = 1."""
        size = self._size(site)
        return {"alpha": size, "beta": site.ones(len(size))}

    def condition(self, inner: FactoredWeight, params: Parameters, site: Site) -> FactoredWeight:
        """δ ← (a − 1) + b δ, U ← b U with a = α / ‖W‖_F, b = β / max(‖Δ‖_F, floor)."""
        size = self._size(site)
        lives = size > 0
        base_gain = torch.where(lives, params.alpha / torch.where(lives, size, 1), 1)
        update_gain = wide(params.beta) / self._length(inner, site)
        return inner.mix(base_gain, update_gain.to(size.dtype))

    def dense(self, inner: Tensor, params: Parameters, site: Site) -> Tensor:
        """Of the whole matrices, or of every row: α W / ‖W‖ + β Δ / max(‖Δ‖, floor)."""
        base = site.base.dense().to(inner.dtype)
        length, floor, size = self._lengths(base, inner)
        gain = params.beta[:, None] / torch.maximum(length, floor)
        return params.alpha[:, None] * base / size + gain * (inner - base)

    def promises(self, inner: Tensor, weight: Tensor, params: Parameters, site: Site) -> Mapping[str, Promise]:
        """The length of the update is β, above the floor."""
        base = site.base.dense().to(inner.dtype)
        length, floor, size = self._lengths(base, inner)
        found, _, _ = self._lengths(params.alpha[:, None] * base / size, weight)
        expected = params.beta.abs()[:, None] * (length / floor).clamp_max(1)
        return {"‖W' − α W / ‖W‖‖ is |β|, or less in proportion where ‖Δ‖ is below the floor": (found, expected)}

    def _lengths(self, base: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """‖other − base‖, its floor, and ‖base‖ or 1, of the matrices: [1, 1], or of every row: [out, 1]."""
        over = (0, 1) if self.per == "matrix" else (1,)
        length, size = (torch.linalg.vector_norm(each, dim=over, keepdim=True) for each in (other - base, base))
        size = torch.where(size > 0, size, 1)
        return length, size * 0 + _LITERAL_FLOOR if self.floor == "literal" else self.floor * size, size

    def held_magnitudes(self, inner: FactoredWeight, params: Parameters, site: Site) -> Mapping[str, Tensor]:
        """β in proportion to ‖Δ‖_F; below the floor as it is."""
        length = self._length(inner, site)
        return {"beta": (params.beta * (length / length.detach())).to(params.beta.dtype)}

    def neutral_magnitudes(self, inner: FactoredWeight, site: Site) -> Mapping[str, Tensor]:
        """β = max(‖Δ‖_F, floor), and one where Δ = 0."""
        length = self._length(inner, site)
        return {"beta": torch.where(self._measured(inner) > 0, length, 1).to(site.dtype)}

    def _size(self, site: Site) -> Tensor:
        """‖W‖_F: [1], or ‖w_o‖: [out]."""
        return site.frobenius_norm() if self.per == "matrix" else site.row_norms()

    def _measured(self, inner: FactoredWeight) -> Tensor:
        """‖Δ‖_F: [1], or ‖Δ_o‖: [out], in float64."""
        return inner.update_norm() if self.per == "matrix" else inner.update_row_norms()

    def _length(self, inner: FactoredWeight, site: Site) -> Tensor:
        """max(‖Δ‖_F, floor): [1], or max(‖Δ_o‖, floor_o): [out], in float64."""
        size = self._size(site)
        size = torch.where(size > 0, size, 1)
        floor = torch.full_like(size, _LITERAL_FLOOR) if self.floor == "literal" else self.floor * size
        return torch.maximum(self._measured(inner), wide(floor.clamp_min(torch.finfo(size.dtype).tiny)))
