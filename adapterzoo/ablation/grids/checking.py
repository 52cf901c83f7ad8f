"""Trying every cell on a model without values: what can't work fails in seconds, by name, before anything runs."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from adapterzoo.ablation.grids.cells import Cell
from adapterzoo.ablation.runs.identity import digest_of, task_options
from adapterzoo.ablation.tasks.task import Task
from adapterzoo.errors import AdapterError, GridError, listing
from adapterzoo.layer import adapted_layers
from adapterzoo.surgery import adapt


@dataclass(frozen=True)
class Size:
    """What a cell trains.

    Args:
        adapters: trainable parameters of its adapters.
        rest: those of heads and of whatever else trains.
        layers: how many layers are adapted.
    """

    adapters: int
    rest: int
    layers: int


def check(cells: Sequence[Cell]) -> dict[str, Size]:
    """Build every cell's model on the meta device and adapt it there.

    Returns:
        What each cell trains, by its name.

    Raises:
        GridError: every cell that can't work, and why.
    """
    models: dict[str, nn.Module | str] = {}
    sizes: dict[str, Size] = {}
    problems: list[str] = []
    for cell in cells:
        key = digest_of(task_options(cell.task))
        if key not in models:
            models[key] = _skeleton(cell.task)
        model = models[key]
        if isinstance(model, str):
            problems.append(f"{cell.name}: {model}")
            continue
        try:
            sizes[cell.name] = _size(cell, copy.deepcopy(model))
        except (AdapterError, RuntimeError, ValueError, TypeError) as error:
            problems.append(f"{cell.name}: {error}")
    if problems:
        raise GridError(f"{len(problems)} of {len(cells)} cells can't work, and nothing was run:{listing(problems)}")
    return sizes


def _skeleton(task: Task) -> nn.Module | str:
    """The task's model without values, or why there is none."""
    try:
        with torch.device("meta"):
            return task.model(None, 0)
    except Exception as error:  # a task is a plug-in: whatever it raises is its cell's problem
        return f"the task {task.name!r} can't build its model on the meta device: {type(error).__name__}: {error}"


def _size(cell: Cell, model: nn.Module) -> Size:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a run warns of, it warns of in its own output
        if cell.spec is None:
            model.requires_grad_(False)
            for name in cell.task.trained:
                model.get_submodule(name).requires_grad_()
        else:
            adapt(model, cell.spec, _targets(cell.task), train=list(cell.task.trained))
    layers = adapted_layers(model)
    inside = sum(p.numel() for layer in layers.values() for p in layer.adapter.parameters() if p.requires_grad)
    every = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Size(inside, every - inside, len(layers))


def _targets(task: Task) -> str | list[str]:
    return task.targets if isinstance(task.targets, str) else list(task.targets)
