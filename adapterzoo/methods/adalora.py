"""AdaLoRA: an update in the form of a singular value decomposition, whose triplets can be masked."""

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from adapterzoo.factored import FactoredWeight
from adapterzoo.methods.budget import Budget
from adapterzoo.methods.scaled import RankScaled
from adapterzoo.pieces import Parameters, Role
from adapterzoo.registry import register
from adapterzoo.rules import StepRule
from adapterzoo.site import Site
from adapterzoo.wide import safe_sqrt


@register
class AdaLoRA(RankScaled):
    """Adaptive low-rank adaptation, SVD form: ΔW = s · P diag(λ ∘ mask) Q with s = alpha / r.

    With a target_r the ranks are allocated in training (`adapterzoo.attach`): from r for every layer at the start to
    target_r on average at the end, by importance over all layers (`adapterzoo.methods.budget.Budget`). The gradient of
    λ passes the mask, so a masked triplet may return.

    Shapes:
        P: [out, r], N(0, 0.02²); lam (λ): [r], zero; Q: [r, in], N(0, 0.02²); buffer mask: [r], one. After `compact`
        the layer's own rank stands in the place of r, also 0.

    Args:
        r: rank at the start, 1 ≤ r ≤ min(out, in); the scale keeps dividing by it when triplets are masked or removed.
        alpha: numerator of the scale; r if not given.
        target_r: rank at the end, averaged over the layers, 1 ≤ target_r ≤ r; None keeps every triplet.
        t_init: steps of training before the budget begins to fall.
        t_final: steps at the end of training in which the masks stay as they are.
        delta_t: the masks change at every delta_t-th step.
        beta1: smoothing of the importance, 0 ≤ beta1 < 1.
        beta2: smoothing of its uncertainty, 0 ≤ beta2 < 1.
        orth_weight: γ of the penalty γ mean(‖PᵀP − I‖_F, ‖QQᵀ − I‖_F) over all layers; `attach` and `penalty` know it.
        dropout: probability of dropping an input element on the way into Q, in training; 0 ≤ dropout < 1.

    Raises:
        SpecError: a field has a value out of its range, target_r is above r, or there is a schedule without target_r.

    Example:
        >>> import torch
        >>> from adapterzoo import AdaLoRA, AdaptedLinear
        >>> layer = AdaptedLinear(torch.nn.Linear(6, 4), AdaLoRA(r=3))
        >>> sorted(layer.adapter.state_dict())
        ['P', 'Q', 'lam', 'mask']

    Source:
        Zhang et al., arXiv 2303.10512, eq. 3 and section 3; penalty: its published code.

    Deviations:
        The scale is alpha / r; the published code divides by r + 1e-5. The penalty is the published code's, a mean of
        norms; the paper's eq. 4 is a sum of squares. λ and its mask are two things, so that λ's gradient passes the
        mask. The importance of step T − t_final counts; in PEFT the step before is the last that does. Importance
        under a wrapper that normalises: docs/training.md.
    """

    roles: ClassVar[Mapping[str, Role]] = {
        "P": Role.OUTPUT_FACTOR,
        "lam": Role.CORE,
        "Q": Role.INPUT_FACTOR,
        "mask": Role.BUFFER,
    }
    rank_axes: ClassVar[Mapping[str, int]] = {"P": 1, "lam": 0, "Q": 0, "mask": 0}

    target_r: int | None = Field(default=None, ge=1, description="a whole number ≥ 1 and at most r, or None")
    t_init: int = Field(default=0, ge=0, description="a whole number of steps ≥ 0")
    t_final: int = Field(default=0, ge=0, description="a whole number of steps ≥ 0")
    delta_t: int = Field(default=1, ge=1, description="a whole number of steps ≥ 1")
    beta1: float = Field(default=0.85, ge=0, lt=1, description="a number with 0 ≤ beta1 < 1")
    beta2: float = Field(default=0.85, ge=0, lt=1, description="a number with 0 ≤ beta2 < 1")
    orth_weight: float = Field(default=0.1, ge=0, description="a finite number ≥ 0")

    @model_validator(mode="after")
    def _schedule_makes_sense(self) -> Self:
        """target_r ≤ r, and nothing of a schedule without a target."""
        if self.target_r is None:
            set_in_vain = sorted({"t_init", "t_final", "delta_t", "beta1", "beta2"} & set(self.shown_fields()))
            if set_in_vain:
                raise ValueError(f"{', '.join(set_in_vain)} without target_r does nothing: the rank stays {self.r}")
        elif self.target_r > self.r:
            raise ValueError(f"target_r={self.target_r} is above r={self.r}; ranks are taken away, so 1 ≤ target_r ≤ r")
        return self

    def init(self, site: Site) -> Mapping[str, Tensor]:
        """P and Q small and random, λ zero: the update starts at zero."""
        return {
            "P": site.normal("P", site.out_features, self.r, std=0.02),
            "lam": site.zeros(self.r),
            "Q": site.normal("Q", self.r, site.in_features, std=0.02),
            "mask": site.ones(self.r),
        }

    def update(self, params: Parameters, site: Site) -> FactoredWeight:
        """U = P diag(s λ ∘ mask), V = Q; the gradient of λ is that of λ ∘ mask, masked or not."""
        lam = params.lam + (params.lam * params.mask - params.lam).detach()
        return site.low_rank(params.P * (self.scale * lam), params.Q, dropout=self.dropout)

    def dense(self, params: Parameters, site: Site) -> Tensor:
        """(alpha / r) P diag(λ ∘ mask) Q; what the mask takes away has λ's gradient all the same."""
        lam = params.lam - (params.lam * (1 - params.mask)).detach()
        return self.numerator / self.r * (params.P @ torch.diag(lam) @ params.Q)

    def penalty(self, params: Parameters, siblings: int) -> Tensor | None:
        """γ (‖PᵀP − I‖_F + ‖QQᵀ − I‖_F) / (2 siblings), with the subgradient 0 where a norm is 0."""
        if self.orth_weight == 0:
            return None
        return self.orth_weight / (2 * siblings) * (_obliqueness(params.P.mT) + _obliqueness(params.Q))

    def step_rule(self) -> StepRule | None:
        """The budget, if there is a target."""
        return None if self.target_r is None else Budget(self.t_init, self.t_final, self.delta_t)

    def kept_ranks(self, params: Parameters) -> Tensor:
        """The triplets that are not masked: [r], bool."""
        return params.mask != 0


def _obliqueness(rows: Tensor) -> Tensor:
    """‖R Rᵀ − I‖_F: [], how far the rows are from orthonormal."""
    gram = rows @ rows.mT
    return safe_sqrt((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().sum())
