"""Two pieces of adapterzoo's algebra, as a package of their own."""

import math

import torch
from pydantic import Field

from adapterzoo import register
from adapterzoo.pieces import Generator, Role, Wrapper


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
class Contrast(Wrapper):
    """Contrast between the update's rows: W' = W + diag((1 + n_i)ᵗ) Δ with n_i = ‖Δ_i‖; t > 0 sets long rows apart."""

    roles = {"t": Role.MAGNITUDE}

    def init(self, site):
        return {"t": site.zeros(1)}

    def condition(self, inner, params, site):
        gain = (1 + inner.update_row_norms()) ** params.t
        return inner.mix(site.ones(1), gain.to(site.dtype))

    def dense(self, inner, params, site):
        W = site.base.dense()
        return W + (inner - W) * (1 + (inner - W).norm(dim=1, keepdim=True)) ** params.t

    def promises(self, inner, weight, params, site):
        old, new = inner - site.base.dense(), weight - site.base.dense()
        return {"rows keep their direction": (old * new.norm(dim=1)[:, None], new * old.norm(dim=1)[:, None])}
