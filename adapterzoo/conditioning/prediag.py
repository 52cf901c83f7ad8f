"""Pre-Diag: calibrate the rows of the base before the update is added."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from adapterzoo.factored import FactoredWeight
from adapterzoo.pieces import Parameters, Promise, Role, Wrapper
from adapterzoo.registry import register
from adapterzoo.site import Site


@register
class PreDiag(Wrapper):
    """Diagonal calibration before the sum: W' = diag(d) W + Δ, with Δ = W_inner − W.

    Shapes:
        diag (d): [out], one.

    Args:
        inner: the generator or wrapper whose update is added.

    Example:
        >>> from adapterzoo import LoRA, PreDiag
        >>> PreDiag(LoRA(r=4))
        PreDiag(LoRA(r=4))

    Source:
        arXiv 2511.00051 (Pre-Diag): d acts on output rows, before the update is added.

    Deviations:
        The bias is left alone; the published code scales it by d in forward and forgets it in merge.
    """

    roles: ClassVar[Mapping[str, Role]] = {"diag": Role.MAGNITUDE}

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """d = 1."""
        return {"diag": site.ones(site.out_features)}

    def condition(self, inner: FactoredWeight, params: Parameters, site: Site) -> FactoredWeight:
        """δ ← δ + (d − 1)."""
        return inner.calibrate_base(params.diag - 1)

    def dense(self, inner: Tensor, params: Parameters, site: Site) -> Tensor:
        """Row by row, d_i w_i + Δ_i."""
        base = site.base.dense().to(inner.dtype)
        return params.diag[:, None] * base + (inner - base)

    def promises(self, inner: Tensor, weight: Tensor, params: Parameters, site: Site) -> Mapping[str, Promise]:
        """Only the base is calibrated."""
        base = site.base.dense().to(inner.dtype)
        return {
            "what is added to diag(d) W is the inside's update": (weight - params.diag[:, None] * base, inner - base)
        }
