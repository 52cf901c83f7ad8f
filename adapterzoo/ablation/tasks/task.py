"""What a task is: a frozen description of model, data, metric and loop, which every cell of a grid runs."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from adapterzoo.ablation.tasks.loop import train
from adapterzoo.ablation.tasks.records import Columns as Columns
from adapterzoo.ablation.tasks.records import Log as Log
from adapterzoo.ablation.tasks.records import Outcome as Outcome
from adapterzoo.ablation.tasks.records import Part as Part
from adapterzoo.ablation.tasks.records import Run as Run
from adapterzoo.ablation.tasks.records import Scores as Scores
from adapterzoo.ablation.tasks.records import columns as columns


class Task(BaseModel, ABC):
    """A builder of model, data, metric and loop; its fields are the options that a grid may set, tune or vary.

    A task is a value: its options decide, with a seed and a spec, all that a run does. For one seed every spec gets the
    same base weights, data, order of batches, head and first values of its generator.

    Args:
        lr: learning rate at its peak.
        steps: of the optimiser.
        batch: examples in a step.
        warmup: share of the steps in which the rate rises; then it falls along `schedule`.
        schedule: "cosine" or "linear" to zero, or "constant".
        weight_decay: of all but magnitudes and rotations.
        looks: how often a run looks at the validation part while it trains, evenly spread; the end counts.
        targets: which layers are adapted, as `adapt` takes them from text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    """What a grid calls it."""
    metric: ClassVar[str] = "accuracy"
    """The metric that cells are chosen and compared by."""
    maximise: ClassVar[bool] = True
    percent: ClassVar[bool] = True
    """Whether the metric is a share, to be shown in per cent."""
    trained: ClassVar[tuple[str, ...]] = ()
    """Modules of the model that train beside the adapters: a new head."""
    packable: ClassVar[bool] = False
    """Whether the model treats the examples of a batch one by one, so that several runs may share a forward."""
    unprepared: ClassVar[frozenset[str]] = frozenset(
        {"lr", "steps", "batch", "warmup", "schedule", "weight_decay", "looks"}
    )
    """Options that neither `prepare` nor `load` reads."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    steps: Annotated[int, Field(ge=1)] = 100
    batch: Annotated[int, Field(ge=1)] = 32
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    looks: Annotated[int, Field(ge=1)] = 10
    targets: str | tuple[str, ...] = "all-linear"

    @abstractmethod
    def fingerprint(self) -> str:
        """A short hash of all that a run reads beside its options: data and pretrained weights."""

    def prepare(self, folder: Path) -> None:
        """Make files that all runs read, once a grid and in a process of its own: a pretrained base, cached features.

        Args:
            folder: empty; it appears under its own name only when all is written.
        """
        (folder / "nothing").touch()

    @abstractmethod
    def load(self, folder: Path) -> Any:
        """Data and weights for `Run.shared`, from what `prepare` wrote; once a process, before runs are forked off.

        No backward pass and no thread may run in here: processes are forked afterwards.
        """

    @abstractmethod
    def model(self, shared: Any, seed: int) -> nn.Module:
        """The model before it is adapted, its head drawn from the seed alone.

        Args:
            shared: what `load` gave; None on the meta device, where a grid is checked and only shapes count.
            seed: of the run.
        """

    @abstractmethod
    def batches(self, shared: Any, seed: int) -> Iterable[Any]:
        """`steps` batches for training, in an order that depends on the seed alone."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch: []."""

    @abstractmethod
    def scores(self, model: nn.Module, shared: Any, part: Part, seed: int) -> Scores:
        """Look at one part of the data; the model is in evaluation mode, without gradients."""

    def run(self, run: Run) -> Outcome:
        """Adapt, train, score; override it to bring a loop of your own."""
        return train(self, run)
