"""The process that does a run: what an engine calls, with a payload of JSON's types alone."""

import os
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import torch

from adapterzoo.ablation.packing.pack import pack
from adapterzoo.ablation.runs.environment import environment
from adapterzoo.ablation.runs.identity import OTHER_CODE, RunSpec, code_version
from adapterzoo.ablation.runs.store import Attempt, Store
from adapterzoo.ablation.tasks.registry import bring, make_task
from adapterzoo.ablation.tasks.task import Outcome, Run, Task
from adapterzoo.ablation.trackers.tracker import Tracking
from adapterzoo.errors import RunsError
from adapterzoo.registry import parse

_KEPT = 3
_SHARED: OrderedDict[str, Any] = OrderedDict()


def perform(payload: Mapping[str, Any]) -> None:
    """Do what a payload says: prepare a task, or do a run.

    Args:
        payload: {"what": "prepare", "task", "into"} or {"what": "run", "folder", "runs", "labels", "prepared",
            "device", "threads", "trackers", "where"}.
    """
    _settle(payload)
    if payload["what"] == "prepare":
        prepare(make_task(payload["task"]), Path(payload["into"]))
    else:
        do_runs(payload)


def warm(payload: Mapping[str, Any]) -> None:
    """Load what the runs of a task share into this process, before runs are forked off it."""
    _settle(payload)
    task = make_task(payload["task"])
    code_version(task)  # read once, and kept for the runs
    shared_of(task, Path(payload["prepared"]))


def _settle(payload: Mapping[str, Any]) -> None:
    torch.set_num_threads(int(payload.get("threads", 1)))
    if payload.get("where"):
        bring(payload["where"])


def prepare(task: Task, into: Path) -> None:
    """Let a task make its files; they appear under their name when all are written, or not at all."""
    beside = into.with_name(f".partial-{into.name}-{secrets.token_hex(4)}")
    beside.mkdir(parents=True)
    try:
        task.prepare(beside)
        if not into.exists():
            beside.rename(into)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def do_runs(payload: Mapping[str, Any]) -> None:
    """Do runs, side by side if there are several, and keep what each gave, or why it failed.

    Raises:
        OSError: a record can't be written.
        RunsError: this process has other code than the driver; no run was begun.
    """
    store = Store(Path(payload["folder"]))
    for run in payload["runs"]:
        _check_code(RunSpec.model_validate(run))
    going = [
        Going.begin(store, RunSpec.model_validate(run), payload, label)
        for run, label in zip(payload["runs"], payload["labels"], strict=True)
    ]
    for run, outcome in zip(going, _outcomes(going, payload), strict=True):
        run.end(outcome)


@dataclass(frozen=True, eq=False)
class Going:
    """A run that is going on: where it is kept, and who is told of it."""

    spec: RunSpec
    attempt: Attempt
    tracking: Tracking
    start: float

    @classmethod
    def begin(cls, store: Store, spec: RunSpec, payload: Mapping[str, Any], label: str) -> Self:
        """Begin to keep a run."""
        tracking = Tracking(payload.get("trackers", ()), label, {"id": spec.id, **spec.model_dump()})
        return cls(spec, store.begin(spec), tracking, perf_counter())

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep metrics, and pass them on."""
        self.attempt.log(step, metrics)
        self.tracking.log(step, metrics)

    def end(self, outcome: Outcome | Exception) -> None:
        """Keep how it ended."""
        seconds = perf_counter() - self.start
        if isinstance(outcome, Exception):
            self.tracking.finish("failed", {})
            self.attempt.fail(outcome, seconds)
        else:
            self.tracking.finish("done", outcome.metrics)
            self.attempt.finish(outcome, seconds)


def shared_of(task: Task, prepared: Path) -> Any:
    """What the runs of a task share: loaded once in a process, the last few kept."""
    key = f"{prepared}:{type(task).__qualname__}"
    if key not in _SHARED:
        _SHARED[key] = task.load(prepared)
        while len(_SHARED) > _KEPT:
            _SHARED.popitem(last=False)
    _SHARED.move_to_end(key)
    return _SHARED[key]


def _outcomes(going: Sequence[Going], payload: Mapping[str, Any]) -> Sequence[Outcome | Exception]:
    """What each run gave, or why it failed; never an exception of its own."""
    try:
        tasks = [run.spec.make_task() for run in going]
        device = torch.device(payload.get("device", "cpu"))
        record = {**environment(tasks[0], device), "process": os.getpid()}
        for run in going:
            run.attempt.environment(record)
        shared = shared_of(tasks[0], Path(payload["prepared"]))
        runs = [_told(run, shared, device) for run in going]
        if len(runs) == 1:
            return [tasks[0].run(runs[0])]
        return pack(tasks, runs, tell=lambda choice: _keep(going, {**record, "packing": choice.record()}))
    except Exception as error:  # whatever a task raises is that run's end, and is kept with its traceback
        return [error] * len(going)


def _keep(going: Sequence[Going], record: Mapping[str, Any]) -> None:
    for run in going:
        run.attempt.environment(record)


def _told(run: Going, shared: Any, device: torch.device) -> Run:
    composition = None if run.spec.spec is None else parse(run.spec.spec)
    return Run(composition, run.spec.seed, shared, device, run.spec.test, run.log)


def _check_code(spec: RunSpec) -> None:
    """A worker with other code than the driver's would give a run the wrong name; no run is begun then."""
    here = code_version(spec.make_task())
    if here != spec.code:
        raise RunsError(f"{OTHER_CODE}: {here}, and the driver has {spec.code}; install the same code everywhere")
