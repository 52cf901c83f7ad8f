"""Two pieces of adapterzoo's algebra, as a package of their own."""

import math

import torch
from adapterzoo import register
from adapterzoo.pieces import Generator, Role, Wrapper
from pydantic import Field


@register
class Cosines(Generator):
    """An update that is smooth along the inputs: ΔW = B C, C_kj = cos(π k (j + ½) / in), k < r; B alone trains."""

    roles = {"B": Role.OUTPUT_FACTOR}
    r: int = Field(default=8, ge=1, description="a whole number ≥ 1")

    def init(self, site):
        return {"B": site.zeros(site.out_features, self.r)}

    def update(self, params, site):
        k, j = (torch.arange(n, device=params.B.device) for n in (self.r, site.in_features))
        waves = (k[:, None] * (j + 0.5) * (math.pi / site.in_features)).cos()
        return site.low_rank(params.B, waves.to(params.B.dtype))


@register
class SoftCap(Wrapper):
    """No row of the update longer than 1/|s|: W' = W + diag(1 / √(1 + s² n_i²)) Δ, with n_i = ‖Δ_i‖."""

    roles = {"s": Role.MAGNITUDE}

    def init(self, site):
        return {"s": site.ones(1)}

    def condition(self, inner, params, site):
        gain = (1 + (params.s * inner.update_row_norms()).square()).rsqrt()
        return inner.mix(site.ones(1), gain.to(site.dtype))

    def dense(self, inner, params, site):
        update = inner - site.base.dense()
        return site.base.dense() + update / (1 + params.s**2 * (update**2).sum(dim=1, keepdim=True)).sqrt()

    def promises(self, inner, weight, params, site):
        lengths = params.s.abs() * (weight - site.base.dense()).norm(dim=1)
        return {"no row of the update is longer than 1/|s|": (lengths, lengths.clamp(max=1))}
