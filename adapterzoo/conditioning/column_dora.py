"""ColumnDoRA: a trained magnitude for every input column, and a direction."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adapterzoo.factored import FactoredWeight
from adapterzoo.pieces import Parameters, Promise, Role, Wrapper
from adapterzoo.registry import register
from adapterzoo.site import Site
from adapterzoo.terms import Columns


@register
class ColumnDoRA(Wrapper):
    """DoRA over the other axis: W' = W_inner diag(m / n), n_j = ‖(W_inner)_:j‖ over the outputs.

    A zero column of the inside stays zero, in value and gradient.

    Shapes:
        magnitude (m): [in], the column norms of W.

    Args:
        inner: the generator or wrapper whose weight gives the directions.
        detach_norm: take n as a constant for the gradient; False is the exact gradient.

    Example:
        >>> from adapterzoo import ColumnDoRA, LoRA
        >>> ColumnDoRA(LoRA(r=4))
        ColumnDoRA(LoRA(r=4))

    Source:
        Liu et al., arXiv 2402.09353, eq. 5, with "column" read as a column of torch's [out, in] weight: what some
        public codes compute (LyCORIS with wd_on_output=False; BiDoRA). The paper's axis is DoRA's.

    Deviations:
        n is taken as a constant, as DoRA's; the codes named above let gradients through.
    """

    roles: ClassVar[Mapping[str, Role]] = {"magnitude": Role.MAGNITUDE}

    detach_norm: bool = Field(default=True, description="True or False")

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """m = the column norms of W, by the very function that computes n."""
        return {"magnitude": site.column_norms()}

    def condition(self, inner: FactoredWeight, params: Parameters, site: Site) -> FactoredWeight:
        """Every column times m / n; carried as m / n − 1, which is exactly zero at the start."""
        norms = inner.column_norms(constant=self.detach_norm)
        lives = norms > 0
        gain = torch.where(lives, params.magnitude / torch.where(lives, norms, 1), 1)
        return inner.turn(Columns(gain - 1))

    def neutral_magnitudes(self, inner: FactoredWeight, site: Site) -> Mapping[str, Tensor]:
        """m = the column norms of the inside."""
        return {"magnitude": inner.column_norms()}

    def held_magnitudes(self, inner: FactoredWeight, params: Parameters, site: Site) -> Mapping[str, Tensor]:
        """m in proportion to n, where the gradient knows n."""
        if self.detach_norm:
            return {}
        norms = inner.column_norms()
        return {"magnitude": params.magnitude * torch.where(norms > 0, norms / norms.detach(), 1)}

    def dense(self, inner: Tensor, params: Parameters, site: Site) -> Tensor:
        """W_inner diag(m / n)."""
        norms = (inner.detach() if self.detach_norm else inner).square().sum(dim=0).sqrt()
        return inner * (params.magnitude / torch.where(norms > 0, norms, torch.inf))

    def promises(self, inner: Tensor, weight: Tensor, params: Parameters, site: Site) -> Mapping[str, Promise]:
        """The columns of W' have the lengths |m|, where the inside's are not zero."""
        lives = inner.norm(dim=0) > 0
        return {"the column norms of W' are |m|": (weight.norm(dim=0)[lives], params.magnitude.abs()[lives])}
