"""Slots: how many runs there are at a time, and which GPU each of them sees."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

from adapterzoo.ablation.engines.calling import PERFORM, WARM
from adapterzoo.errors import count

_VISIBLE = "CUDA_VISIBLE_DEVICES"


class LocalOptions(BaseModel):
    """What `local` can be told.

    Args:
        workers: runs at a time on the processor; as many as it has cores for, `threads` to each, if not given.
        threads: cores that a run is reckoned to need, where `workers` is not given.
        gpus: which GPUs to use: numbers among those that are visible, names (a UUID, MIG-...), or "all".
        per_gpu: runs at a time on each GPU.
        fresh: whether each run gets a process that begins with nothing, instead of a fork of a warm one. If not
            given, runs are forked on Linux; a run with a GPU never is.
        perform, warm: what carries an order out, and what loads what runs share, as "module:function".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: PositiveInt | None = None
    threads: PositiveInt = 1
    gpus: tuple[int | str, ...] | Literal["all"] | None = None
    per_gpu: PositiveInt = 1
    fresh: bool | None = None
    perform: str = PERFORM
    warm: str = WARM

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.gpus is None and self.per_gpu > 1:
            raise ValueError("per_gpu is given and gpus are not; name them, or say gpus='all'")
        if self.gpus is not None and self.workers is not None:
            raise ValueError("workers and gpus can't both be given: on GPUs, per_gpu says how many runs there are")
        if self.fresh is False and not hasattr(os, "fork"):
            raise ValueError(f"{sys.platform} has no fork; leave fresh out, and each run gets a process that is new")
        self.slots()
        return self

    def slots(self) -> list["Slot"]:
        """A slot for each run at a time, neighbours on different GPUs."""
        if self.gpus is None:
            return [Slot(None)] * (self.workers or max(1, cores() // self.threads))
        return [Slot(name) for _ in range(self.per_gpu) for name in gpu_names(self.gpus)]

    def forks(self) -> bool:
        """Whether runs without a GPU are forked."""
        return sys.platform == "linux" if self.fresh is None else not self.fresh


@dataclass(frozen=True)
class Slot:
    """Room for one run.

    Args:
        gpu: the one it sees, as CUDA_VISIBLE_DEVICES names it; None where it may see what the driver sees.
    """

    gpu: str | None

    @property
    def environment(self) -> dict[str, str]:
        """Variables that its process gets."""
        return {} if self.gpu is None else {_VISIBLE: self.gpu}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_names(gpus: Sequence[int | str] | Literal["all"]) -> list[str]:
    """What CUDA calls the GPUs that were asked for: numbers count among those that this process may see.

    Raises:
        ValueError: there are none, or fewer, or one comes twice.
    """
    outer = os.environ.get(_VISIBLE)
    visible = outer.split(",") if outer is not None else [str(i) for i in range(torch.cuda.device_count())]
    visible = [name.strip() for name in visible if name.strip()]
    asked = range(len(visible)) if gpus == "all" else gpus
    beyond = [gpu for gpu in asked if isinstance(gpu, int) and not 0 <= gpu < len(visible)]
    if beyond or not asked:
        raise ValueError(f"{count(len(visible), 'GPU')} visible, and gpus asks for {list(asked) or gpus}")
    names = [visible[gpu] if isinstance(gpu, int) else gpu for gpu in asked]
    if len(set(names)) < len(names):
        raise ValueError(f"a GPU is named twice: {', '.join(names)}; per_gpu says how many runs each one has")
    return names
