"""One run: one cell, one learning rate, one seed."""

from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import nn
from torch.nn import functional as F

from adapterzoo.ablation.digits import Images, new_digits, split
from adapterzoo.ablation.transformer import Classifier, State, batches, descend, new_model
from adapterzoo.registry import parse
from adapterzoo.streams import stream
from adapterzoo.surgery import adapt

STEPS, BATCH, LOOK_EVERY = 150, 32, 15


@dataclass(frozen=True)
class Point:
    """One point of a training curve: the loss of that step's batch, and the validation accuracy after the step."""

    step: int
    loss: float
    val_accuracy: float


@dataclass(frozen=True)
class Record:
    """What one run gave. `test_accuracy` is None where the test set was not looked at."""

    val_accuracy: float
    val_loss: float
    test_accuracy: float | None
    adapter_parameters: int
    head_parameters: int
    ms_per_step: float
    curve: tuple[Point, ...]


def run(spec: str | None, lr: float, seed: int, base: State, *, test: bool, steps: int = STEPS) -> Record:
    """Adapt the base to the new digits: a pure function of its arguments, but for the time it takes.

    For one seed, base, training and validation set, order of batches, head and the generator's first values are the
    same for every spec.

    Args:
        spec: what adapts every linear layer, such as "MAP(LoRA(r=2))"; None trains the head alone.
        lr: learning rate at the start; it falls to zero along a cosine.
        seed: what the run draws, it draws from this.
        base: the pretrained backbone.
        test: whether the run may look at the test set, at its end; a run that tunes may not.
        steps: how many.
    """
    model, parts = prepare(spec, seed, base), split(seed)
    train, validation = new_digits().pick(parts.train), new_digits().pick(parts.validation)
    curve, milliseconds = _train(model, train, validation, lr, seed, steps)
    val_accuracy, val_loss = score(model, validation)
    test_accuracy = score(model, new_digits().pick(parts.test))[0] if test else None
    adapter, head = trainable(model.backbone), trainable(model.head)
    return Record(val_accuracy, val_loss, test_accuracy, adapter, head, milliseconds, curve)


def prepare(spec: str | None, seed: int, base: State) -> Classifier:
    """The model of a cell before its first step: adapters on every linear layer, all else frozen but the head."""
    model = new_model(seed, base)
    if spec is None:
        model.backbone.requires_grad_(False)
    else:
        adapt(model, parse(spec), "all-linear", train=["head"], seed=seed)
    return model


def score(model: nn.Module, images: Images) -> tuple[float, float]:
    """Accuracy and mean loss."""
    model.eval()
    with torch.no_grad():
        logits = model(images.pixels)
    model.train()
    right = int((logits.argmax(dim=1) == images.labels).sum())
    return right / len(images), F.cross_entropy(logits, images.labels).item()


def trainable(module: nn.Module) -> int:
    """How many parameters train."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _train(
    model: Classifier, train: Images, validation: Images, lr: float, seed: int, steps: int
) -> tuple[tuple[Point, ...], float]:
    # No weight decay: it pulls factors towards the base, but gains and magnitudes, which start at 1 or ‖W‖, to zero.
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    curve: list[Point] = []
    seconds: list[float] = []
    for step, batch in enumerate(batches(train, BATCH, steps, stream("batches", seed)), start=1):
        start = perf_counter()
        loss = descend(model, batch, optimiser)
        schedule.step()
        seconds.append(perf_counter() - start)
        if step % LOOK_EVERY == 0:
            curve.append(Point(step, loss, score(model, validation)[0]))
    return tuple(curve), 1000 * median(seconds)
