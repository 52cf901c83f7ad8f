"""Who needs something done at every step of an optimiser, and does not get it: a warning, once, by name."""

import warnings
from typing import Any, Protocol
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from adapterzoo.adapter import Adapter
from adapterzoo.errors import UnattendedWarning, listing, where


class Adapted(Protocol):
    """A layer with an adapter."""

    name: str
    adapter: Adapter


class Watch:
    """The layers whose pieces have a step rule, until someone attends to them.

    The first step of any torch optimiser that holds a parameter of such a layer warns, once, by name.
    """

    def __init__(self) -> None:
        self._waiting: WeakSet[Any] = WeakSet()
        self._hooked = False

    def see(self, layer: Adapted) -> None:
        """Wait for someone to attend to a layer, if it needs that."""
        if not any(part.spec.step_rule() for part in layer.adapter.parts()):
            return
        self._waiting.add(layer)
        if not self._hooked:
            register_optimizer_step_post_hook(self._after_step)
            self._hooked = True

    def attended(self, layer: Adapted) -> None:
        """Stop waiting: someone does what the layer needs."""
        self._waiting.discard(layer)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._waiting:
            return
        stepped = {id(value) for group in optimizer.param_groups for value in group["params"]}
        left_alone = [layer for layer in self._waiting if any(id(p) in stepped for p in needing(layer))]
        for layer in left_alone:
            self._waiting.discard(layer)
        if left_alone:
            lines = sorted(f"{where(layer.name)}: {layer.adapter.spec!r}" for layer in left_alone)
            warnings.warn(
                "an optimiser has taken a step, but nobody does what these pieces need at every step, so their ranks "
                f"stay as they are:{listing(lines)}\nCall adapterzoo.attach(model, optimizer, total_steps=...) before "
                "training, or leave target_r out for a fixed rank",
                UnattendedWarning,
                stacklevel=4,
            )


def needing(layer: Adapted) -> list[nn.Parameter]:
    """The parameters of the pieces with a step rule."""
    parts = [part for part in layer.adapter.parts() if part.spec.step_rule()]
    return [value for part in parts for value in part.parameters(recurse=False)]


WATCH = Watch()
"""The one watch of this process."""
