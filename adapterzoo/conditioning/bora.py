"""BoRA: trained magnitudes for the columns, then for the rows."""

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
class BoRA(Wrapper):
    """Magnitudes of both axes: W₁ = W_inner diag(m_c / ‖W_inner‖_col), W' = diag(m_r / ‖W₁‖_row) W₁.

    Zero columns and rows of the inside stay zero, in value and gradient.

    Shapes:
        columns (m_c): [in], the column norms of W; rows (m_r): [out], the row norms of W.

    Args:
        inner: the generator or wrapper whose weight gives the directions.
        detach_norm: take both norms as constants for the gradient; False is the exact gradient.

    Example:
        >>> from adapterzoo import BoRA, LoRA
        >>> BoRA(LoRA(r=4))
        BoRA(LoRA(r=4))

    Source:
        arXiv 2412.06441 (BoRA): magnitudes of both axes, in two steps of normalisation. Unverified: the order of the
        steps, and the start at the norms of W (docs/pieces/bora.md).

    Deviations:
        Both norms are constants for the gradient by default, as DoRA's; nothing is known of the paper's.
    """

    roles: ClassVar[Mapping[str, Role]] = {"columns": Role.MAGNITUDE, "rows": Role.MAGNITUDE}

    detach_norm: bool = Field(default=True, description="True or False")

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """The norms of W, by the very functions that compute them in the forward."""
        return {"columns": site.column_norms(), "rows": site.row_norms()}

    def condition(self, inner: FactoredWeight, params: Parameters, site: Site) -> FactoredWeight:
        """Columns, then rows; both gains are exactly one at the start."""
        norms = inner.column_norms(constant=self.detach_norm)
        turned = inner.turn(Columns(_gain(params.columns, norms) - 1))
        return turned.scale_rows(_gain(params.rows, turned.row_norms(constant=self.detach_norm)))

    def neutral_magnitudes(self, inner: FactoredWeight, site: Site) -> Mapping[str, Tensor]:
        """The norms of the inside."""
        return {"columns": inner.column_norms(), "rows": inner.row_norms()}

    def held_magnitudes(self, inner: FactoredWeight, params: Parameters, site: Site) -> Mapping[str, Tensor]:
        """Both in proportion to their norms, where the gradient knows these."""
        if self.detach_norm:
            return {}
        norms = inner.column_norms()
        rows = inner.turn(Columns(_gain(params.columns, norms) - 1)).row_norms()
        return {"columns": params.columns * _share(norms), "rows": params.rows * _share(rows)}

    def dense(self, inner: Tensor, params: Parameters, site: Site) -> Tensor:
        """diag(m_r / ‖W₁‖_row) W₁ with W₁ = W_inner diag(m_c / ‖W_inner‖_col)."""
        norms = (inner.detach() if self.detach_norm else inner).square().sum(dim=0).sqrt()
        first = inner * (params.columns / torch.where(norms > 0, norms, torch.inf))
        norms = (first.detach() if self.detach_norm else first).square().sum(dim=1).sqrt()
        return first * (params.rows / torch.where(norms > 0, norms, torch.inf))[:, None]

    def promises(self, inner: Tensor, weight: Tensor, params: Parameters, site: Site) -> Mapping[str, Promise]:
        """The rows of W' have the lengths |m_r|, where the inside's are not zero."""
        lives = inner.norm(dim=1) > 0
        return {"the row norms of W' are |m_r|": (weight.norm(dim=1)[lives], params.rows.abs()[lives])}


def _gain(magnitudes: Tensor, norms: Tensor) -> Tensor:
    """M / n, and one where n is zero: nothing is there to be scaled."""
    lives = norms > 0
    return torch.where(lives, magnitudes / torch.where(lives, norms, 1), 1)


def _share(norms: Tensor) -> Tensor:
    """N / n₀ with the value of n as a constant: one, with its gradient."""
    return torch.where(norms > 0, norms / torch.where(norms > 0, norms, 1).detach(), 1)
