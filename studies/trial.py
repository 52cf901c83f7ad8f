"""One run: one arm, one learning rate, one seed."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from adapterzoo.ablation.minilm import contrast, embed, embed_all
from adapterzoo.layer import adapted_layers
from adapterzoo.registry import parse
from adapterzoo.streams import stream
from adapterzoo.surgery import adapt
from adapterzoo.training.attach import attach
from adapterzoo.training.compact import compact, ranks
from adapterzoo.training.groups import param_groups
from adapterzoo.training.stages import stages
from studies.arms import Arm, Job, Settings
from studies.lab import Encoded, Lab, score


def run(job: Job, lab: Lab) -> dict[str, Any]:
    """Adapt the encoder: a pure function of its arguments, but for the time it takes.

    For one seed the batches and their order are the same for every arm, and so are the first values of what has the
    same name and shape. Only a reported run looks at the test set, and only a tuning run at the validation set.
    """
    start = perf_counter()
    model, settings = lab.build(), lab.settings
    adapt(model, parse(job.arm.spec), seed=job.seed)
    before = trainable(model)
    optimiser = AdamW(param_groups(model, job.lr, scale_aware=job.arm.scale_aware), weight_decay=0.0)
    attachment = attach(model, optimiser, total_steps=settings.steps)
    schedule = LambdaLR(optimiser, lambda step: rate_factor(step, settings))
    history: dict[str, list[Any]] = {"loss": [], "penalty_share": [], "ranks": [], "seconds": []}
    with _turns(job.arm, model, optimiser):
        for chosen in batches(lab.train.packages, settings, stream("batches", job.seed)):
            begun = perf_counter()
            history["loss"].append(descend(model, optimiser, lab.train, chosen))
            schedule.step()
            history["seconds"].append(perf_counter() - begun)
            history["ranks"] += [text] if (text := "".join(map(str, ranks(model).values()))) else []
            history["penalty_share"].append(_plain(attachment.penalty_share))
    change = compaction(model, lab.validation)
    part = lab.test if job.role == "report" else lab.validation
    return {
        "arm": job.arm.name, "spec": job.arm.spec, "lr": job.lr, "seed": job.seed, "role": job.role,
        "parameters_in_training": before, "parameters": trainable(model), "change_by_compaction": change,
        "layers": list(adapted_layers(model)), "ms_per_step": round(1000 * median(history.pop("seconds")), 1),
        "loss": [round(value, 4) for value in history.pop("loss")], **history,
        **score(model, part), "run_seconds": round(perf_counter() - start, 1),
    }  # fmt: skip


def descend(model: nn.Module, optimiser: AdamW, train: Encoded, chosen: Tensor) -> float:
    """One step on one batch; gives back its loss."""
    optimiser.zero_grad()
    loss = contrast(embed(model, train.docstrings.pick(chosen)), embed(model, train.codes.pick(chosen)))
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return loss.item()


def batches(packages: Tensor, settings: Settings, order: torch.Generator) -> Iterator[Tensor]:
    """Indices for every step: functions of one package. A pass over all has an order of its own, and drops rests.

    Shapes:
        packages: [n], the number of each pair's package; a batch: [settings.batch].
    """
    groups = [(packages == number).nonzero()[:, 0] for number in sorted(set(packages.tolist()))]
    left: list[Tensor] = []
    for _ in range(settings.steps):
        if not left:
            shuffled = [group[torch.randperm(len(group), generator=order)] for group in groups]
            whole = [part for group in shuffled for part in group.split(settings.batch) if len(part) == settings.batch]
            left = [whole[index] for index in torch.randperm(len(whole), generator=order).tolist()]
        yield left.pop()


def rate_factor(step: int, settings: Settings) -> float:
    """By what the learning rate is multiplied: up along a line, then down to zero along another."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    return max(0.0, (settings.steps - step) / max(1, settings.steps - settings.warmup))


def compaction(model: nn.Module, part: Encoded) -> float | None:
    """Take masked ranks out; the largest change of an embedding's number by it. None where no rank can be masked."""
    if not ranks(model):
        return None
    some = part.docstrings.pick(torch.arange(min(32, len(part.packages))))
    model.eval()
    before = embed_all(model, some)
    compact(model)
    change = (embed_all(model, some) - before).abs().max().item()
    model.train()
    return change


def trainable(model: nn.Module) -> int:
    """How many parameters train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _turns(arm: Arm, model: nn.Module, optimiser: AdamW) -> Any:
    return nullcontext() if arm.turns is None else stages(model, optimiser, steps=arm.turns)


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
