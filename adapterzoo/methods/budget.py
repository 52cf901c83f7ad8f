"""AdaLoRA's budget: how many triplets a model may keep at a step, and which."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapterzoo.errors import count
from adapterzoo.methods import importance
from adapterzoo.rules import Member, Report, StepRule
from adapterzoo.sharded import sharded_like


@dataclass(frozen=True)
class Budget(StepRule):
    """The triplets with the highest scores of all layers are kept, fewer and fewer of them, the others masked.

        b(t) = b₀                                                      t ≤ t_init
        b(t) = ⌊b_T + (b₀ − b_T) (1 − (t − t_init)/(T − t_init − t_final))³⌋    until T − t_final, b_T from there

    with b₀ = Σ r and b_T = Σ target_r over the layers. After each step the importance of a number w is I = |w ∂L/∂w|,
    smoothed: Ī ← β₁ Ī + (1 − β₁) I, Ū ← β₂ Ū + (1 − β₂) |I − Ī|; a triplet's score is
    s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij) with s = Ī Ū.

    Args:
        t_init: steps before the first triplet is masked.
        t_final: steps at the end with the masks of step T − t_final.
        delta_t: the masks change at every delta_t-th step, and at T − t_final.

    Source:
        Zhang et al., arXiv 2303.10512, eqs. 8 to 12 and its schedule; the masks are chosen by rank and not by a
        threshold, so that ties keep exactly b(t) triplets.
    """

    t_init: int
    t_final: int
    delta_t: int

    def misfit(self, total_steps: int) -> str | None:
        """T > t_init + t_final."""
        if total_steps > self.t_init + self.t_final:
            return None
        return (
            f"its budget can't fall: t_init={self.t_init} and t_final={self.t_final} leave none of "
            f"{count(total_steps, 'step')}; total_steps must be above {self.t_init + self.t_final}"
        )

    def finished(self, step: int, total_steps: int) -> bool:
        """Whether the masks are the final ones."""
        return step >= total_steps - self.t_final

    def at(self, step: int, total_steps: int, start: int, target: int) -> int:
        """b(t) for b₀ = start and b_T = target."""
        end = total_steps - self.t_final
        if step <= self.t_init:
            return start
        if step >= end:
            return target
        left = 1 - (step - self.t_init) / (end - self.t_init)
        return int(target + (start - target) * left**3)

    def begin(self, members: Sequence[Member]) -> None:
        """Make room for Ī and Ū."""
        importance.begin(members)

    def step(self, members: Sequence[Member], step: int, total_steps: int) -> Report:
        """Take note of the importance, mask what does not fit the budget, and set its λ to zero."""
        end = total_steps - self.t_final
        start, target = (sum(getattr(member.spec, rank) for member in members) for rank in ("r", "target_r"))
        budget, report = self.at(step, total_steps, start, target), importance.sources(members)
        if step <= end:
            importance.remember(members)
        if self.t_init < step <= end and (step % self.delta_t == 0 or step == end):
            allocate(members, budget)
        elif step > end:
            keep(members, budget)
        return {"budget": budget, **report}


def keep(members: Sequence[Member], budget: int) -> None:
    """Leave the masks as they are, unless a run that goes on with fewer steps has missed its last allocation."""
    if kept(members) > budget:
        allocate(members, budget)
    silence(members)


def kept(members: Sequence[Member]) -> int:
    """How many triplets are not masked."""
    device = members[0].values["mask"].device
    return int(torch.stack([member.values["mask"].count_nonzero().to(device) for member in members]).sum())


def silence(members: Sequence[Member]) -> None:
    """Set λ to zero where it is masked."""
    for member in members:
        lam = member.values["lam"]
        lam.mul_(sharded_like(member.values["mask"].to(lam.dtype), lam))


def allocate(members: Sequence[Member], budget: int) -> None:
    """Keep the `budget` triplets with the highest scores, but no more than now; mask the others, and set their λ to 0.

    Of equal ones those stay that stand first in their layers. The budget of one run never rises; that of a run that
    goes on with more steps may, and what training has taken away does not come back at random.
    """
    each = [importance.scores(member) for member in members]
    places = torch.cat([torch.arange(len(score)) for score in each])
    flat = torch.cat([score.to(each[0].device) for score in each]).nan_to_num(nan=-1.0)
    fair = places.argsort(stable=True).to(flat.device)  # the first triplet of every layer, then the second of every one
    best = fair[flat[fair].argsort(descending=True, stable=True)[: min(budget, kept(members))]]
    mask = torch.zeros_like(flat).index_fill_(0, best, 1.0)
    for member, part in zip(members, torch.split(mask, [len(score) for score in each]), strict=True):
        member.values["mask"].copy_(part)
    silence(members)
