"""Who does what layers need at every step of an optimiser; where nobody does, a warning, once, by name."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from adapterzoo.adapter import Adapter
from adapterzoo.errors import UnattendedWarning, listing, where

ASLEEP: set[int] = set()
"""Ids of the parameters that stages put to sleep and wake: they train, also while their flag says that they don't."""


class Adapted(Protocol):
    """A layer with an adapter."""

    name: str
    adapter: Adapter


class Attendant(Protocol):
    """Whoever does what layers need at every step of one optimiser."""

    optimizer: Optimizer
    in_step: bool

    @property
    def adds_penalty(self) -> bool:
        """Whether it adds penalties to the gradients."""

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""


class Watch:
    """The layers whose pieces have a step rule, and who attends to them.

    The first step that an optimiser takes with parameters of a layer that it is not attended in warns, once, by name.
    """

    def __init__(self) -> None:
        self._needing: WeakSet[Any] = WeakSet()
        self._attendants: WeakKeyDictionary[Any, ref[Attendant]] = WeakKeyDictionary()
        self._hooked = False

    def see(self, layer: Adapted) -> None:
        """Look after a layer, if it needs something at every step."""
        if not any(part.spec.step_rule() for part in layer.adapter.parts()):
            return
        self._needing.add(layer)
        if not self._hooked:
            register_optimizer_step_post_hook(self._after_step)
            self._hooked = True

    def attend(self, layer: Adapted, attendant: Attendant) -> None:
        """From now on someone does what the layer needs. The optimiser's hooks keep that one alive."""
        self._attendants[layer] = ref(attendant)

    def leave(self, layer: Adapted, attendant: Attendant) -> None:
        """That one does it no more; if all was done, the layer needs nothing further."""
        if self.attendant_of(layer) is attendant:
            del self._attendants[layer]
            if attendant.finished:
                self._needing.discard(layer)

    def attendant_of(self, layer: Adapted) -> Any:
        """Who attends to a layer, or None."""
        found = self._attendants.get(layer)
        return None if found is None else found()

    def attended_in(self, optimizer: Optimizer) -> list[Any]:
        """The layers that are attended to in the steps of an optimiser."""
        pairs = [(layer, found()) for layer, found in self._attendants.items()]
        return [layer for layer, attendant in pairs if attendant is not None and attendant.optimizer is optimizer]

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        suspects = [layer for layer in self._needing if not self._is_attended(layer, optimizer)]
        if not suspects:
            return
        stepped = {id(value) for group in optimizer.param_groups for value in group["params"]}
        left_alone = [layer for layer in suspects if any(trains(p) and id(p) in stepped for p in needing(layer))]
        if not left_alone or is_blank(optimizer):
            return
        for layer in left_alone:
            self._needing.discard(layer)
        _warn(left_alone)

    def _is_attended(self, layer: Adapted, optimizer: Optimizer) -> bool:
        """By this optimiser, by one around it that is in its own step, or by one inside of it."""
        attendant = self.attendant_of(layer)
        if attendant is None:
            return False
        inside = attendant.optimizer is optimizer or any(
            part is attendant.optimizer for part in vars(optimizer).values()
        )
        return inside or attendant.in_step


def trains(parameter: nn.Parameter) -> bool:
    """Whether a parameter trains, now or when its turn comes."""
    return parameter.requires_grad or id(parameter) in ASLEEP


def is_blank(optimizer: Optimizer) -> bool:
    """Whether a step is none: no parameter has a gradient; or all are zero and so is every learning rate.

    torch's distributed checkpoints take one of the second kind, to make an optimiser's state.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return True
    if any(group["lr"] != 0 for group in optimizer.param_groups if "lr" in group):
        return False
    return not any(bool(grad.any()) for grad in grads)


def needing(layer: Adapted) -> Iterator[nn.Parameter]:
    """The parameters of the pieces with a step rule."""
    for part in layer.adapter.parts():
        if part.spec.step_rule() is not None:
            yield from part.parameters(recurse=False)


def _warn(layers: list[Adapted]) -> None:
    lines = sorted(f"{where(layer.name)}: {layer.adapter.spec!r}" for layer in layers)
    warnings.warn(
        "an optimiser has taken a step, but nobody does what these pieces need at every step of it, so their ranks "
        f"stay as they are:{listing(lines)}\nCall adapterzoo.attach(model, optimizer, total_steps=...) before "
        "training, or leave target_r out for a fixed rank",
        UnattendedWarning,
        stacklevel=_callers_level(),
    )


def _callers_level() -> int:
    """How far up `_warn`'s caller finds the line that is neither torch's nor this library's: the user's own step."""
    own, frame, level = (str(Path(torch.__file__).parent), str(Path(__file__).parent)), sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(own):
        frame, level = frame.f_back, level + 1
    return level


WATCH = Watch()
"""The one watch of this process."""
