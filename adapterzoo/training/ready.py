"""What stands against attaching a model to an optimiser, all of it at once."""

import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from adapterzoo.adapter import Adapter
from adapterzoo.errors import TrainingError, listing, where
from adapterzoo.layer import AdaptedLinear, adapted_layers
from adapterzoo.rules import StepRule
from adapterzoo.watch import WATCH, needing, trains

Layers = Mapping[str, AdaptedLinear]


def check_steps(total_steps: object) -> int:
    """The number of steps as an int; raise a TrainingError unless it is a whole number ≥ 1."""
    try:
        if not isinstance(total_steps, bool) and operator.index(total_steps) >= 1:  # type: ignore[arg-type]
            return operator.index(total_steps)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise TrainingError(
        f"total_steps={total_steps!r} is not valid: it should be the number of steps that the optimiser is going to "
        "take in all, a whole number ≥ 1"
    )


def trained_layers(model: nn.Module, optimizer: Optimizer) -> dict[str, AdaptedLinear]:
    """The layers whose adapters train, by name; raise a TrainingError if there is none."""
    layers = adapted_layers(model)
    if not layers:
        raise TrainingError(f"this {type(model).__name__} has no adapted layer; adapt(model, spec) makes them")
    found = {name: layer for name, layer in layers.items() if any(map(trains, layer.adapter.parameters()))}
    if not found:
        raise TrainingError(
            f"every adapter of this {type(model).__name__} is frozen; layer.adapter.requires_grad_(True) thaws one"
        )
    return found


def ruled_pieces(layers: Layers) -> dict[StepRule, list[tuple[AdaptedLinear, Adapter]]]:
    """The pieces with a step rule, by their rule."""
    found: dict[StepRule, list[tuple[AdaptedLinear, Adapter]]] = defaultdict(list)
    for layer in layers.values():
        for part in layer.adapter.parts():
            rule = part.spec.step_rule()
            if rule is not None:
                found[rule].append((layer, part))
    return dict(found)


def check(layers: Layers, optimizer: Optimizer, total_steps: int) -> None:
    """Raise a TrainingError that lists all that stands against attaching."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    problems = [*_merged(layers), *_not_held(layers, held), *_without_room(layers, total_steps)]
    problems += _elsewhere(layers, optimizer)
    if problems:
        raise TrainingError(f"attach can't do what this model needs:{listing(problems)}")


def earlier_attachments(layers: Layers, optimizer: Optimizer) -> list[Any]:
    """Whoever attends to some of these layers, each once."""
    found = (WATCH.attendant_of(layer) for layer in layers.values())
    return list({id(attendant): attendant for attendant in found if attendant is not None}.values())


def _merged(layers: Layers) -> Iterable[str]:
    for name, layer in layers.items():
        if layer.merged:
            yield f"{where(name)} is merged and can't be trained; unmerge it first"


def _not_held(layers: Layers, held: set[int]) -> Iterable[str]:
    for name, layer in layers.items():
        needed = {id(p) for p in needing(layer) if trains(p)}
        strangers = [n for n, p in layer.adapter.named_parameters() if id(p) in needed - held]
        if strangers:
            yield (
                f"{where(name)} has parameters that the optimiser does not hold ({', '.join(strangers)}); build one "
                "optimiser for all of them, from adapterzoo.param_groups(model, lr=...), after adapt"
            )


def _without_room(layers: Layers, total_steps: int) -> Iterable[str]:
    for rule, entries in ruled_pieces(layers).items():
        misfit = rule.misfit(total_steps)
        if misfit:
            layer, part = entries[0]
            yield f"{where(layer.name)}, {part.spec!r}: {misfit}"


def _elsewhere(layers: Layers, optimizer: Optimizer) -> Iterable[str]:
    """An optimiser counts its steps once, so it can't be attached to two models."""
    others = [layer for layer in WATCH.attended_in(optimizer) if layer not in layers.values()]
    if others:
        names = ", ".join(sorted(layer.name for layer in others))
        yield (
            f"this optimiser is attached already, to layers that are not in this model ({names}); attach what holds "
            "them all, such as torch.nn.ModuleList([one, other]), or detach() the earlier attachment"
        )
