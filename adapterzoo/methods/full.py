"""Full: a dense update, the reference of every ablation."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from adapterzoo.factored import FactoredWeight
from adapterzoo.pieces import Generator, Parameters, Role
from adapterzoo.registry import register
from adapterzoo.site import Site


@register
class Full(Generator):
    """Full fine-tuning as a piece: ΔW = delta, a dense matrix.

    It costs what full fine-tuning costs: a second [out, in] matrix, and dense norms under a wrapper that needs norms.

    Shapes:
        delta: [out, in], zero.

    Example:
        >>> from adapterzoo import Full, MAP
        >>> MAP(Full())
        MAP(Full())

    Source:
        None: the unconstrained case.

    Deviations:
        The update is kept apart from the base, so that weight decay pulls towards the base and not towards zero.
    """

    roles: ClassVar[Mapping[str, Role]] = {"delta": Role.UPDATE}

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """Zero: the update starts at zero."""
        return {"delta": site.zeros(site.out_features, site.in_features)}

    def update(self, params: Parameters, site: Site) -> FactoredWeight:
        """D = delta."""
        return site.dense_update(params.delta)

    def dense(self, params: Parameters, site: Site) -> Tensor:
        """Delta itself."""
        return params.delta
