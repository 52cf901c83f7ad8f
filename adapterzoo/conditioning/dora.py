"""DoRA: a trained magnitude for every output row, and a direction."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adapterzoo.factored import FactoredWeight
from adapterzoo.pieces import Parameters, Promise, Role, Wrapper
from adapterzoo.registry import register
from adapterzoo.site import Site


@register
class DoRA(Wrapper):
    """Weight-decomposed adaptation: W' = diag(m / n) W_inner, n_i = ‖(W_inner)_i‖ over the inputs.

    A zero row of the inside stays zero, in value and gradient.

    Shapes:
        magnitude (m): [out], the row norms of W.

    Args:
        inner: the generator or wrapper whose weight gives the directions.
        detach_norm: take n as a constant for the gradient (the paper's section 4.3); False is the exact gradient.

    Example:
        >>> from adapterzoo import DoRA, LoRA
        >>> DoRA(LoRA(r=4), detach_norm=False)
        DoRA(LoRA(r=4), detach_norm=False)

    Source:
        Liu et al., arXiv 2402.09353, eq. 5; its "column" is a row of torch's [out, in] weight.

    Deviations:
        n comes from W, U and V without forming W'; the published code forms it. Dropout acts on the update alone;
        PEFT's also drops in the base term. Published codes give NaN on a zero row.
    """

    roles: ClassVar[Mapping[str, Role]] = {"magnitude": Role.MAGNITUDE}

    detach_norm: bool = Field(default=True, description="True or False")

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """m = the row norms of W, by the very function that computes n."""
        return {"magnitude": site.row_norms()}

    def condition(self, inner: FactoredWeight, params: Parameters, site: Site) -> FactoredWeight:
        """Every row times g = m / n. Where n = 0, the update times 0, and so the row of W that it cancels, if any."""
        norms = inner.row_norms(constant=self.detach_norm)
        lives = norms > 0
        gain = params.magnitude / torch.where(lives, norms, torch.inf)
        stays = (~lives & (site.base.row_norms_sq() == 0)).to(gain.dtype)
        return inner.mix(gain + stays, gain)

    def dense(self, inner: Tensor, params: Parameters, site: Site) -> Tensor:
        """Row by row, w'_i = m_i w_i / ‖w_i‖ of the inside's rows; zero where w_i is."""
        norms = torch.linalg.vector_norm(inner, dim=1, keepdim=True)
        norms = norms.detach() if self.detach_norm else norms
        return params.magnitude[:, None] * torch.where(norms > 0, inner / torch.where(norms > 0, norms, 1), 0)

    def promises(self, inner: Tensor, weight: Tensor, params: Parameters, site: Site) -> Mapping[str, Promise]:
        """The rows of W' are as long as the magnitudes say."""
        lengths = torch.where(inner.norm(dim=1) > 0, params.magnitude.abs(), 0)
        return {"every row of W' is |m| long, where the inside's row is not zero": (weight.norm(dim=1), lengths)}

    def neutral_magnitudes(self, inner: FactoredWeight, site: Site) -> Mapping[str, Tensor]:
        """m = the row norms of the inside."""
        return {"magnitude": inner.row_norms()}

    def held_magnitudes(self, inner: FactoredWeight, params: Parameters, site: Site) -> Mapping[str, Tensor]:
        """m in proportion to n, where the gradient knows n."""
        if self.detach_norm:
            return {}
        norms = inner.row_norms()
        return {"magnitude": params.magnitude * torch.where(norms > 0, norms / norms.detach(), 1)}
