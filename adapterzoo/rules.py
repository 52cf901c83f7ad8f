"""What a piece may need at every step of an optimiser: rules that look at all the layers of a model together."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Member:
    """One piece of one layer, as a step rule sees it right after an optimiser's step.

    Args:
        layer: name of the layer.
        spec: the piece's spec.
        values: its parameters and buffers by name, the tensors themselves; a rule writes into them in place.
        grads: the gradient that the step was taken with, by parameter, without a loss scale; none where there was none.
            The gains of normalising wrappers are held (docs/training.md, "What importance means").
        penalty_grads: the part of it that came from the pieces' penalties, where `attach` added them.
        memory: what a rule keeps from step to step, by parameter. It is the optimiser's own state of that parameter,
            so it is saved and loaded with it.
    """

    layer: str
    spec: Any
    values: Mapping[str, Tensor]
    grads: Mapping[str, Tensor]
    penalty_grads: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Mapping[str, dict[str, Any]] = field(default_factory=dict)


Report = Mapping[str, Tensor | float]
"""Numbers worth showing, by name; those of several rules are summed."""


class StepRule(ABC):
    """What has to be done after every step of the optimiser. Pieces with equal rules are handled together.

    A subclass is a frozen dataclass: it holds options, and no state.
    """

    def misfit(self, total_steps: int) -> str | None:
        """Say why this rule can't run over that many steps; None if it can."""
        return None

    def begin(self, members: Sequence[Member]) -> None:
        """Make what `memory` will hold, at its start, where the optimiser's state has begun without a step.

        torch's distributed checkpoints load only what is there already.
        """
        return

    @abstractmethod
    def step(self, members: Sequence[Member], step: int, total_steps: int) -> Report:
        """Do the work after a step; called without gradients.

        Args:
            members: every piece with this rule that trains, in the order of the model's layers.
            step: how many steps the optimiser has taken, this one included.
            total_steps: how many it is going to take.

        Returns:
            Numbers worth showing.
        """

    def finished(self, step: int, total_steps: int) -> bool:
        """Whether the rule needs no gradients any more, and nothing is going to change, after so many steps."""
        return step >= total_steps
