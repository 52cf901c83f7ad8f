"""The driver: it submits what a grid still asks for, takes in how runs end, and chooses what is reported."""

import errno
import heapq
import itertools
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Protocol

from adapterzoo.ablation.driving.orders import Job, Orders, Settings
from adapterzoo.ablation.engines.engine import Ended, Engine, Order
from adapterzoo.ablation.grids.planned import CellRecord, Metrics, Planned, reports
from adapterzoo.ablation.runs.identity import OTHER_CODE
from adapterzoo.ablation.runs.store import PREPARED, Store, no_writing
from adapterzoo.errors import RunsError

_PATIENCE = 1.0
_LOOK_AHEAD = 4


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


@dataclass
class Tally:
    """How a grid went: runs done and failed now, runs found, and cells that could not be run to their end."""

    done: int = 0
    failed: int = 0
    found: int = 0
    unfinished: list[str] = field(default_factory=list)


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
        self._orders = Orders(store.folder.resolve(), settings, elsewhere=engine.name != "inline")
        self._metrics: dict[str, Metrics | None] = {}
        self._trials_left: dict[str, int] = {}
        self._ready: list[Job] = []
        self._unprepared: dict[str, list[Job]] = {}
        self._in_flight: dict[str, tuple[list[Job], float]] = {}
        self._order = itertools.count()

    def drive(self) -> Tally:
        """Do it; an interruption leaves every finished run in its place.

        Raises:
            RunsError: runs can't be kept any more: the disk is full, say.
        """
        for record in self._records:
            self._plan_trials(record)
        self._listener.expect(sum(len(r.trials()) + len(r.seeds) for r in self._records), self.tally.found)
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
        job = Job((turn, next(self._order)), planned, record)
        place = self._orders.prepared(record)
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
                self._send(self._orders.prepare(jobs[0].record), [])
        while self._ready and len(self._in_flight) < self._engine.capacity:
            jobs = self._next()
            self._listener.stage("running")
            for job in jobs:
                self._listener.started(job.planned.run.id, job.label, job.planned.role)
            self._send(self._orders.run(jobs), jobs)

    def _next(self) -> list[Job]:
        """The next job, with others that may share its process."""
        jobs = [heapq.heappop(self._ready)]
        fellows, most = self._orders.fellows(jobs[0]), self._settings.pack
        left: list[Job] = []
        for _ in range(min(len(self._ready), _LOOK_AHEAD * most) if fellows is not None else 0):
            job = heapq.heappop(self._ready)
            (jobs if len(jobs) < most and self._orders.fellows(job) == fellows else left).append(job)
        for job in left:
            heapq.heappush(self._ready, job)
        return jobs

    def _send(self, order: Order, jobs: list[Job]) -> None:
        self._in_flight[order.key] = (jobs, perf_counter())
        self._engine.submit(order)

    def _take(self, ended: Ended) -> None:
        jobs, start = self._in_flight.pop(ended.key)
        if not jobs:
            self._take_preparation(ended)
        for job in jobs:
            result = self._store.result(job.planned.run.id)
            if result is None and len(jobs) > 1:
                # What ended a shared process was one of its runs; each gets one of its own, and shows which.
                heapq.heappush(self._ready, replace(job, alone=True))
                continue
            result = result or self._crashed(job, ended, perf_counter() - start)
            self._tell(job, result)
            self._learn(job.planned, job.record, result)
        self._drop_empty_output(ended.key)

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
            f"{ended.problem or 'it left no files'} (its output: {self._orders.output(ended.key)})"
        )

    def _crashed(self, job: Job, ended: Ended, seconds: float) -> dict[str, Any]:
        """Keep that a process ended without a record of its own.

        Raises:
            RunsError: it ended because nothing can be written here, or because it has other code: no run's own fault.
        """
        problem = ended.problem or "its process ended without a record; does it see the folder under the same path?"
        self._store.check_writable()
        if os.strerror(errno.ENOSPC) in problem:
            raise no_writing(self._store.folder, OSError(errno.ENOSPC, problem))
        if OTHER_CODE in problem:
            raise RunsError(problem[problem.index(OTHER_CODE) :])
        try:
            self._store.begin(job.planned.run).fail(problem, seconds)
        except OSError as error:
            raise no_writing(self._store.folder, error) from None
        result = self._store.result(job.planned.run.id)
        assert result is not None
        return result

    def _tell(self, job: Job, result: Mapping[str, Any]) -> None:
        planned, done = job.planned, result["status"] == "done"
        self.tally.done += done
        self.tally.failed += not done
        error = result.get("error", {})
        problem = None if done else f"{error['type']}: {error['message']}".removeprefix(": ")
        metric = result["metrics"].get(f"validation/{job.record.metric}")
        status = result["status"]
        self._listener.ended(planned.run.id, job.label, planned.role, status, metric, result["seconds"], problem)

    def _drop_empty_output(self, key: str) -> None:
        with suppress(OSError):
            output = self._orders.output(key)
            if output.stat().st_size == 0:
                output.unlink()
