"""The importance of AdaLoRA's triplets: how it is remembered from step to step, and where it comes from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from adapterzoo.rules import Member
from adapterzoo.sharded import gathered

SENSITIVITY, UNCERTAINTY = "adapterzoo_sensitivity", "adapterzoo_uncertainty"
"""Under these keys the optimiser's state of a parameter holds Ī and Ū, in the parameter's shape and dtype."""


def remember(member: Member) -> None:
    """Ī and Ū of every number whose parameter got a gradient, with the value after the step."""
    for name, grad in member.grads.items():
        importance, memory = (member.values[name] * grad).abs(), member.memory[name]
        mean = memory.setdefault(SENSITIVITY, torch.zeros_like(importance))
        mean.lerp_(importance, 1 - member.spec.beta1)
        spread = memory.setdefault(UNCERTAINTY, torch.zeros_like(importance))
        spread.lerp_((importance - mean).abs(), 1 - member.spec.beta2)


def scores(member: Member) -> Tensor:
    """The score of every triplet of a layer: [r], float64; zero where nothing is known yet."""
    score = torch.zeros_like(member.values["mask"], dtype=torch.float64)
    for name, memory in member.memory.items():
        if SENSITIVITY in memory:
            score += per_triplet(name, memory[SENSITIVITY].double() * memory[UNCERTAINTY].double())
    return score


def penalty_share(members: Sequence[Member]) -> Tensor | float:
    """How much of this step's importance comes from the penalties: Σ I(penalty) / (Σ I(task) + Σ I(penalty))."""
    penalty = [size(member, name, grad) for member in members for name, grad in member.penalty_grads.items()]
    if not penalty:
        return 0.0
    task = [
        size(member, name, grad - member.penalty_grads[name] if name in member.penalty_grads else grad)
        for member in members
        for name, grad in member.grads.items()
    ]
    both = torch.stack([torch.stack(part).sum() for part in (penalty, task)])
    return both[0] / both.sum().clamp_min(torch.finfo(both.dtype).tiny)


def size(member: Member, name: str, grad: Tensor) -> Tensor:
    """Σ |w grad|, as it counts in the scores: [], float64, on the CPU."""
    return per_triplet(name, (member.values[name] * grad).abs()).double().sum().cpu()


def per_triplet(name: str, numbers: Tensor) -> Tensor:
    """One number for every triplet, from λ's own, a column of P or a row of Q: [r]."""
    axis = {"P": 0, "Q": 1}.get(name)
    return gathered(numbers if axis is None else numbers.mean(dim=axis))
