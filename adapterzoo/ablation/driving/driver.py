"""The driver: it submits what a grid still asks for, takes in how runs end, and chooses what is reported."""

import heapq
import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from adapterzoo.ablation.engines.engine import Ended, Engine, Order
from adapterzoo.ablation.grids.planned import CellRecord, Metrics, Planned, Role, reports
from adapterzoo.ablation.runs.identity import digest_of
from adapterzoo.ablation.runs.store import Store
from adapterzoo.ablation.tasks.registry import task_class, whereabouts
from adapterzoo.errors import RunsError

OUTPUT, PREPARED = "output", "prepared"
_PATIENCE = 1.0


class Listener(Protocol):
    """Who is told what happens: the live display, or a test."""

    def stage(self, text: str) -> None:
        """What is being done now."""

    def note(self, text: str) -> None:
        """Something that a reader should know."""

    def expect(self, total: int, done_already: int) -> None:
        """How many runs there are, and how many of them were found done."""

    def started(self, key: str, label: str, role: str) -> None:
        """A run was handed to the engine."""

    def ended(
        self, key: str, label: str, role: str, status: str, metric: float | None, seconds: float, problem: str | None
    ) -> None:
        """A run has ended."""


@dataclass(frozen=True)
class Settings:
    """How runs are done; nothing in here changes what they give.

    Args:
        device: "cpu" or "cuda".
        threads: of each run.
        trackers: as `--track` names them.
        retry_failed: do runs again that have failed.
    """

    device: str = "cpu"
    threads: int = 1
    trackers: tuple[str, ...] = ()
    retry_failed: bool = False


@dataclass
class Tally:
    """How a grid went: runs done and failed now, runs found, and cells that could not be run to their end."""

    done: int = 0
    failed: int = 0
    found: int = 0
    unfinished: list[str] = field(default_factory=list)


@dataclass(order=True)
class _Job:
    """A run in its turn: searches first, then reports seed by seed, so that cells lack the same seeds if it stops."""

    turn: tuple[int, ...]
    planned: Planned = field(compare=False)
    record: CellRecord = field(compare=False)


class Driver:
    """Does all the runs of a grid that are not done yet.

    Args:
        records: the cells.
        store: where runs are kept.
        engine: where they happen.
        listener: who is told.
        settings: how runs are done.
        tally: is counted on.
    """

    def __init__(
        self,
        records: Sequence[CellRecord],
        store: Store,
        engine: Engine,
        listener: Listener,
        settings: Settings,
        tally: Tally,
    ) -> None:
        self.tally = tally
        self._records = list(records)
        self._store, self._engine, self._listener, self._settings = store, engine, listener, settings
        self._metrics: dict[str, Metrics | None] = {}
        self._trials_left: dict[str, int] = {}
        self._ready: list[_Job] = []
        self._unprepared: dict[str, list[_Job]] = {}
        self._in_flight: dict[str, tuple[_Job | None, float]] = {}
        self._order = itertools.count()

    def drive(self) -> Tally:
        """Do it; an interruption leaves every finished run in its place.

        Raises:
            RunsError: runs can't be kept any more: the disk is full, say.
        """
        self._listener.expect(sum(len(r.trials()) + len(r.seeds) for r in self._records), 0)
        for record in self._records:
            self._plan_trials(record)
        while self._ready or self._unprepared or self._in_flight:
            self._submit()
            for ended in self._engine.wait(_PATIENCE):
                self._take(ended)
        return self.tally

    def _plan_trials(self, record: CellRecord) -> None:
        trials = [Planned(run, record.cell, "tune", run.seed, record.points[index]) for index, run in record.trials()]
        self._trials_left[record.cell] = len(trials)
        for planned in trials:
            self._plan(planned, record, 0)
        if not trials:
            self._plan_reports(record)

    def _plan_reports(self, record: CellRecord) -> None:
        found = reports(record, self._metrics.get)
        if not found:
            self.tally.unfinished.append(f"{record.cell}: no point of its search was run to its end")
            self._listener.note(self.tally.unfinished[-1])
        for turn, planned in enumerate(found, start=1):
            self._plan(planned, record, turn)

    def _plan(self, planned: Planned, record: CellRecord, turn: int) -> None:
        """Queue a run, or take in that it has ended before."""
        result = self._store.result(planned.run.id)
        if result is not None and result["status"] == "failed" and self._settings.retry_failed:
            self._store.forget(planned.run.id)
            result = None
        if result is not None:
            self.tally.found += 1
            self._learn(planned, record, result)
            return
        job = _Job((turn, next(self._order)), planned, record)
        place = self._prepared(record)
        if place.is_dir():
            heapq.heappush(self._ready, job)
        else:
            self._unprepared.setdefault(place.name, []).append(job)

    def _learn(self, planned: Planned, record: CellRecord, result: Mapping[str, Any]) -> None:
        """Take in what a run gave; after the last trial of a cell its reported runs are planned."""
        self._metrics[planned.run.id] = result["metrics"] if result["status"] == "done" else None
        if planned.role == "tune":
            self._trials_left[record.cell] -= 1
            if self._trials_left[record.cell] == 0:
                self._plan_reports(record)

    def _submit(self) -> None:
        for name, jobs in self._unprepared.items():
            if f"prepare-{name}" not in self._in_flight:
                self._listener.stage("preparing the task")
                self._send(f"prepare-{name}", None, self._preparation(jobs[0].record))
        while self._ready and len(self._in_flight) < self._engine.capacity:
            job = heapq.heappop(self._ready)
            self._listener.stage("running")
            self._listener.started(job.planned.run.id, _label(job.planned), job.planned.role)
            self._send(job.planned.run.id, job, self._payload(job))

    def _send(self, key: str, job: _Job | None, payload: dict[str, Any]) -> None:
        self._in_flight[key] = (job, perf_counter())
        self._engine.submit(Order(key, payload))

    def _take(self, ended: Ended) -> None:
        job, start = self._in_flight.pop(ended.key)
        if job is None:
            self._take_preparation(ended)
            return
        result = self._store.result(ended.key) or self._crashed(job, ended, perf_counter() - start)
        self._tell(job, result)
        self._learn(job.planned, job.record, result)

    def _take_preparation(self, ended: Ended) -> None:
        name = ended.key.removeprefix("prepare-")
        jobs = self._unprepared.pop(name)
        if (self._store.folder / PREPARED / name).is_dir():
            for job in jobs:
                heapq.heappush(self._ready, job)
            return
        self._store.check_writable()
        cells = sorted({job.planned.cell for job in jobs})
        raise RunsError(
            f"the task of {', '.join(cells[:3])}{' and others' if len(cells) > 3 else ''} could not be prepared: "
            f"{ended.problem or 'it left no files'} (its output: {self._store.folder / OUTPUT / ended.key}.txt)"
        )

    def _crashed(self, job: _Job, ended: Ended, seconds: float) -> dict[str, Any]:
        """Keep that a process ended without a record of its own."""
        self._store.check_writable()
        problem = ended.problem or "its process ended without a record; does it see the folder under the same path?"
        self._store.begin(job.planned.run).fail(problem, seconds)
        result = self._store.result(ended.key)
        assert result is not None
        return result

    def _tell(self, job: _Job, result: Mapping[str, Any]) -> None:
        planned, done = job.planned, result["status"] == "done"
        self.tally.done += done
        self.tally.failed += not done
        error = result.get("error", {})
        problem = None if done else f"{error['type']}: {error['message']}".removeprefix(": ")
        metric = result["metrics"].get(f"validation/{job.record.metric}")
        status = result["status"]
        self._listener.ended(planned.run.id, _label(planned), planned.role, status, metric, result["seconds"], problem)
        with suppress(OSError):
            output = self._output(planned.run.id)
            if output.stat().st_size == 0:
                output.unlink()

    def _prepared(self, record: CellRecord) -> Path:
        """Where the files of a cell's task stand: of options that no run changes, its data and its code."""
        unread = task_class(record.task["name"]).unprepared
        content = {name: value for name, value in record.task.items() if name not in unread}
        return self._store.folder / PREPARED / digest_of([content, record.data, record.code])

    def _preparation(self, record: CellRecord) -> dict[str, Any]:
        place = self._prepared(record)
        return {
            "what": "prepare",
            "task": record.task,
            "where": self._where(record),
            "into": str(place),
            "threads": self._settings.threads,
            "output": str(self._output(f"prepare-{place.name}")),
        }

    def _payload(self, job: _Job) -> dict[str, Any]:
        prepared, where = str(self._prepared(job.record)), self._where(job.record)
        return {
            "what": "run", "folder": str(self._store.folder), "run": job.planned.run.model_dump(), "where": where,
            "prepared": prepared, "device": self._settings.device, "threads": self._settings.threads,
            "trackers": list(self._settings.trackers), "label": _label(job.planned),
            "output": str(self._output(job.planned.run.id)),
            "warm": {"task": job.record.task, "where": where, "prepared": prepared, "threads": self._settings.threads},
        }  # fmt: skip

    def _where(self, record: CellRecord) -> dict[str, str]:
        """Where other processes find the task; in this one it is known already."""
        return {} if self._engine.name == "inline" else whereabouts(task_class(record.task["name"]))

    def _output(self, key: str) -> Path:
        folder = self._store.folder / OUTPUT
        folder.mkdir(exist_ok=True)
        return folder / f"{key}.txt"


def _label(planned: Planned) -> str:
    point = ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in
                      planned.point.items())  # fmt: skip
    return f"{planned.cell}, {point + ', ' if point else ''}seed {planned.seed}"


ROLES: tuple[Role, ...] = ("tune", "report")
