"""One run of a pack, while it lives."""

from dataclasses import dataclass
from time import perf_counter
from typing import Any

from torch import Tensor

from adapterzoo.ablation.packing.proof import check_gradients, check_loss
from adapterzoo.ablation.tasks.devices import synchronise
from adapterzoo.ablation.tasks.loop import Training


@dataclass(eq=False)
class Member:
    """A run with its steps, and what the step that is being taken has given so far.

    Args:
        place: of the run in the order in which runs were given.
        training: its steps.
        batch: of this step.
        loss: of that batch.
        seconds: the run's share of the time that forward and backward took.
    """

    place: int
    training: Training
    batch: Any = None
    loss: float = float("nan")
    seconds: float = 0.0

    def draw(self) -> None:
        """Take the next batch."""
        self.batch = self.training.batch()

    def compute(self) -> None:
        """Loss and gradients by itself, as in `train`."""
        start = perf_counter()
        self.loss = self.training.backward(self.batch)
        synchronise(self.training.run.device)
        self.seconds = perf_counter() - start

    def descend(self) -> None:
        """The optimiser's step; this run's clock stood still while others had their turn."""
        self.training.descend(self.loss, self.seconds)

    def step(self) -> None:
        """A whole step by itself."""
        self.training.step()

    def prove(self) -> None:
        """Hold loss and gradients, which a packed step has given, to those of this run by itself, and go on with these.

        Raises:
            UnpackableError: they differ by more than the tolerance.
            TrainingError: its loss is not finite, which is the run's own fault.
        """
        loss, gradients = self.loss, self._gradients()
        self.forget()
        self.compute()
        floats = [p.dtype for p in self.training.model.parameters() if p.is_floating_point()]
        dtype = min(floats, key=lambda dtype: dtype.itemsize)  # what rounds most
        check_loss(loss, self.loss, dtype)
        check_gradients(gradients, self._gradients(), dtype)

    def forget(self) -> None:
        """Drop gradients of a step that is not going to be taken."""
        for parameter in self._trained():
            parameter.grad = None

    def _gradients(self) -> list[Tensor | None]:
        return [p.grad for p in self._trained()]

    def _trained(self) -> list[Tensor]:
        assert self.training.optimizer is not None
        return [p for group in self.training.optimizer.param_groups for p in group["params"]]
