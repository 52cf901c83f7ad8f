"""Orders: what the driver hands to an engine, and what a run needs to be done anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adapterzoo.ablation.engines.engine import Order
from adapterzoo.ablation.grids.planned import CellRecord, Planned
from adapterzoo.ablation.packing.pack import OF_THE_OPTIMISER
from adapterzoo.ablation.runs.identity import digest_of
from adapterzoo.ablation.runs.store import PREPARED
from adapterzoo.ablation.tasks.registry import task_class, whereabouts
from adapterzoo.errors import GridError

OUTPUT = "output"


@dataclass(frozen=True)
class Settings:
    """How runs are done; nothing in here changes what they give.

    Args:
        device: "cpu" or "cuda".
        threads: of each run.
        trackers: as `--track` names them.
        retry_failed: do runs again that have failed.
        pack: how many runs at most share a process, where they can; 1 gives each its own.

    Raises:
        GridError: fewer than one thread or run, or a device that is none.
    """

    device: str = "cpu"
    threads: int = 1
    trackers: tuple[str, ...] = ()
    retry_failed: bool = False
    pack: int = 1

    def __post_init__(self) -> None:
        few = [name for name in ("threads", "pack") if getattr(self, name) < 1]
        if few:
            raise GridError(", ".join(f"--{name} {getattr(self, name)}" for name in few) + ": at least 1 is needed")
        try:
            torch.device(self.device)
        except RuntimeError:
            raise GridError(f"--device {self.device!r} is no device; take cpu or cuda") from None


@dataclass(order=True)
class Job:
    """A run in its turn: searches first, then reports seed by seed, so that cells lack the same seeds if it stops."""

    turn: tuple[int, ...]
    planned: Planned = field(compare=False)
    record: CellRecord = field(compare=False)
    alone: bool = field(compare=False, default=False)

    @property
    def label(self) -> str:
        """What messages call it: cell, tuned options, seed."""
        point = [f"{name} {_short(value)}" for name, value in self.planned.point.items()]
        return ", ".join([self.planned.cell, *point, f"seed {self.planned.seed}"])


@dataclass(frozen=True)
class Orders:
    """Makes orders.

    Args:
        folder: of the runs; absolute, since an engine's processes may stand elsewhere.
        settings: how runs are done.
        elsewhere: whether other processes do them, which have to find the task's class.
    """

    folder: Path
    settings: Settings
    elsewhere: bool

    def prepare(self, record: CellRecord) -> Order:
        """Let a task make the files that its runs read."""
        place = self.prepared(record)
        key = f"prepare-{place.name}"
        payload = {"what": "prepare", "task": record.task, "into": str(place), "output": str(self.output(key))}
        return Order(key, {**payload, "where": self._where(record), "threads": self.settings.threads})

    def run(self, jobs: Sequence[Job]) -> Order:
        """Do a run, or several that share a process."""
        runs = [job.planned.run for job in jobs]
        key = runs[0].id if len(runs) == 1 else f"pack-{digest_of([run.id for run in runs])}"
        record, settings = jobs[0].record, self.settings
        warm = {
            "task": record.task, "where": self._where(record), "prepared": str(self.prepared(record)),
            "threads": settings.threads,
        }  # fmt: skip
        payload = {
            "what": "run", "folder": str(self.folder), "runs": [run.model_dump() for run in runs],
            "labels": [job.label for job in jobs], "device": settings.device, "trackers": list(settings.trackers),
            "output": str(self.output(key)), "warm": warm, **{name: warm[name] for name in warm if name != "task"},
        }  # fmt: skip
        return Order(key, payload)

    def prepared(self, record: CellRecord) -> Path:
        """Where the files of a cell's task stand: of the options that they depend on, its data and its code."""
        unread = task_class(record.task["name"]).unprepared
        content = {name: value for name, value in record.task.items() if name not in unread}
        return self.folder / PREPARED / digest_of([content, record.data, record.code])

    def output(self, key: str) -> Path:
        """Where the process of an order writes what it prints."""
        folder = self.folder / OUTPUT
        folder.mkdir(exist_ok=True)
        return folder / f"{key}.txt"

    def fellows(self, job: Job) -> Any:
        """Jobs of which this is equal may share a process; None for those that stay alone.

        One composition at a time: others gain little by it, and the time of a step would be an average over cells.
        """
        if self.settings.pack == 1 or job.alone:
            return None
        run = job.planned.run
        common = {name: value for name, value in run.task.items() if name not in OF_THE_OPTIMISER}
        return digest_of([run.spec, common, run.test, run.data, run.code])

    def _where(self, record: CellRecord) -> dict[str, str]:
        return whereabouts(task_class(record.task["name"])) if self.elsewhere else {}


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
