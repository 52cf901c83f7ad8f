"""Frozen: no update, for wrappers that are a method by themselves."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from adapterzoo.factored import FactoredWeight
from adapterzoo.pieces import Generator, Parameters, Role
from adapterzoo.registry import register
from adapterzoo.site import Site


@register
class Frozen(Generator):
    """No update: ΔW = 0, and nothing trains. What stands around it is then the whole method.

    DoRA(Frozen()) tunes magnitudes alone, OFT(Frozen()) is orthogonal fine-tuning, SORA(Frozen()) a thin rotation.

    Shapes:
        no parameters.

    Example:
        >>> from adapterzoo import DoRA, Frozen
        >>> DoRA(Frozen())
        DoRA(Frozen())

    Source:
        None: the neutral element of the algebra. Magnitude-only tuning is in the published code of DoRA
        (arXiv 2402.09353).

    Deviations:
        None.
    """

    roles: ClassVar[Mapping[str, Role]] = {}

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}

    def update(self, params: Parameters, site: Site) -> FactoredWeight:
        """W itself."""
        return site.unchanged()

    def dense(self, params: Parameters, site: Site) -> Tensor:
        """Zero."""
        return site.zeros(site.out_features, site.in_features)
