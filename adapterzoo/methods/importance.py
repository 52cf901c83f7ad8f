"""The importance of AdaLoRA's triplets: how it is remembered from step to step, and where it comes from."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from adapterzoo.rules import Member, Report
from adapterzoo.sharded import gathered
from adapterzoo.wide import wide

SENSITIVITY, UNCERTAINTY = "adapterzoo_sensitivity", "adapterzoo_uncertainty"
"""Under these keys the optimiser's state of a parameter holds Ī and Ū, in the parameter's shape and dtype."""

_AXES = {"P": 0, "Q": 1}
"""Over which axis a parameter has several numbers for one triplet."""


def begin(members: Sequence[Member]) -> None:
    """Ī = Ū = 0 for every number that the optimiser has begun with."""
    for member in members:
        for name, memory in member.memory.items():
            for key in (SENSITIVITY, UNCERTAINTY):
                memory.setdefault(key, torch.zeros_like(member.values[name]))


def remember(members: Sequence[Member]) -> None:
    """Ī ← β₁ Ī + (1 − β₁) I and Ū ← β₂ Ū + (1 − β₂) |I − Ī| with I = |w ∂L/∂w|, w after the step.

    A parameter without a gradient keeps both as they are.
    """
    begin(members)
    alike: dict[tuple[float, float], list[tuple[Member, str]]] = defaultdict(list)
    for member in members:
        if member.grads:
            alike[member.spec.beta1, member.spec.beta2] += [(member, name) for name in member.grads]
    for (beta1, beta2), entries in alike.items():
        values = [member.values[name] for member, name in entries]
        memories = [member.memory[name] for member, name in entries]
        importance = torch._foreach_mul(values, [member.grads[name] for member, name in entries])
        torch._foreach_abs_(importance)
        mean = [memory[SENSITIVITY] for memory in memories]
        torch._foreach_lerp_(mean, importance, 1 - beta1)
        torch._foreach_sub_(importance, mean)
        torch._foreach_abs_(importance)
        torch._foreach_lerp_([memory[UNCERTAINTY] for memory in memories], importance, 1 - beta2)


def scores(member: Member) -> Tensor:
    """s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij) with s = Ī Ū: [r], in float64; zero where nothing is known yet."""
    score = wide(torch.zeros_like(member.values["mask"]))
    for name, memory in member.memory.items():
        if SENSITIVITY in memory:
            product = wide(gathered(memory[SENSITIVITY])) * wide(gathered(memory[UNCERTAINTY]))
            score = score + (product.mean(dim=_AXES[name]) if name in _AXES else product)
    return score


def sources(members: Sequence[Member]) -> Report:
    """Σ I of this step, as it counts in the scores: what comes from the task, and what from penalties."""
    with_penalty = [(member, name) for member in members for name in member.penalty_grads if name in member.grads]
    rest = [(member, name) for member in members for name in member.grads if name not in member.penalty_grads]
    penalty = [member.penalty_grads[name] for member, name in with_penalty]
    task = torch._foreach_sub([member.grads[name] for member, name in with_penalty], penalty) if penalty else []
    return {
        "importance": _total(with_penalty + rest, [*task, *(member.grads[name] for member, name in rest)]),
        "importance_of_penalty": _total(with_penalty, penalty),
    }


def _total(entries: Sequence[tuple[Member, str]], grads: Sequence[Tensor]) -> Tensor | float:
    if not grads:
        return 0.0
    parts = torch._foreach_mul([member.values[name] for member, name in entries], list(grads))
    sizes = zip(entries, torch._foreach_norm(parts, 1), strict=True)
    return torch.stack([gathered(size) / _several(member.values[name], name) for (member, name), size in sizes]).sum()


def _several(value: Tensor, name: str) -> int:
    """How many numbers of a parameter belong to one triplet."""
    return value.shape[_AXES[name]] if name in _AXES else 1
