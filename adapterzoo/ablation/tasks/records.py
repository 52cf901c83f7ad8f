"""What a run is told, and what it gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapterzoo.pieces import Piece

Part = Literal["validation", "test"]
Log = Callable[[int, Mapping[str, float]], None]
Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Scores:
    """What a look at one part of the data gave.

    Args:
        metrics: by name, such as {"accuracy": 0.9, "loss": 0.3}; the task's own metric among them.
        examples: one entry an example in every column: `id` (text or whole numbers, the same for every run), `score`
            (larger is better; what paired comparisons over examples average) and whatever else is worth keeping.
    """

    metrics: Mapping[str, float]
    examples: Columns = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Run:
    """What one run is told.

    Args:
        spec: what adapts the model; None trains the head alone.
        seed: what the run draws, it draws from this, so cells of one seed are pairs.
        shared: what `Task.load` gave: data and pretrained weights. Runs only read it.
        device: where to train.
        test: whether the run may look at the test part, at its end; a run that tunes may not.
        log: takes metrics as they come, with the number of steps done.
    """

    spec: Piece | None
    seed: int
    shared: Any
    device: torch.device
    test: bool
    log: Log


@dataclass(frozen=True)
class Outcome:
    """What one run gave.

    Args:
        metrics: numbers by name: "validation/accuracy", "test/accuracy" (of runs that test), "adapter_parameters",
            "head_parameters", "ms_per_step", "memory_bytes", ...
        examples: the columns of the part that was looked at last, see Scores.
    """

    metrics: Mapping[str, float]
    examples: Columns = field(default_factory=dict)


def columns(**values: Any) -> dict[str, NDArray[Any]]:
    """Columns of examples from tensors, lists or arrays."""
    return {
        name: value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        for name, value in values.items()
    }
