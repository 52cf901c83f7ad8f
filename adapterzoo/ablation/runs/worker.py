"""The process that does a run: what an engine calls, with a payload of JSON's types alone."""

import os
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from adapterzoo.ablation.runs.environment import environment
from adapterzoo.ablation.runs.identity import RunSpec, code_version
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
        payload: {"what": "prepare", "task", "into"} or {"what": "run", "folder", "run", "prepared", "device",
            "threads", "trackers", "label"}.
    """
    _settle(payload)
    if payload["what"] == "prepare":
        prepare(make_task(payload["task"]), Path(payload["into"]))
    else:
        do_run(payload)


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


def do_run(payload: Mapping[str, Any]) -> None:
    """Do a run and keep what it gave, or why it failed.

    Raises:
        OSError: the record can't be written.
    """
    spec = RunSpec.model_validate(payload["run"])
    attempt = Store(Path(payload["folder"])).begin(spec)
    start = perf_counter()
    tracking = Tracking(payload.get("trackers", ()), payload.get("label", spec.id), spec.model_dump())
    try:
        outcome = _outcome(spec, payload, attempt, tracking)
    except Exception as error:
        tracking.finish("failed", {})
        attempt.fail(error, perf_counter() - start)
        return
    tracking.finish("done", outcome.metrics)
    attempt.finish(outcome, perf_counter() - start)


def shared_of(task: Task, prepared: Path) -> Any:
    """What the runs of a task share: loaded once in a process, the last few kept."""
    key = f"{prepared}:{type(task).__qualname__}"
    if key not in _SHARED:
        _SHARED[key] = task.load(prepared)
        while len(_SHARED) > _KEPT:
            _SHARED.popitem(last=False)
    _SHARED.move_to_end(key)
    return _SHARED[key]


def _outcome(spec: RunSpec, payload: Mapping[str, Any], attempt: Attempt, tracking: Tracking) -> Outcome:
    task = spec.make_task()
    _check_code(task, spec)
    device = torch.device(payload.get("device", "cpu"))
    attempt.environment({**environment(task, device), "process": os.getpid()})

    def log(step: int, metrics: Mapping[str, float]) -> None:
        attempt.log(step, metrics)
        tracking.log(step, metrics)

    composition = None if spec.spec is None else parse(spec.spec)
    shared = shared_of(task, Path(payload["prepared"]))
    return task.run(Run(composition, spec.seed, shared, device, spec.test, log))


def _check_code(task: Task, spec: RunSpec) -> None:
    """A worker on another machine may have other code than the driver: its runs would carry the wrong name."""
    here = code_version(task)
    if here != spec.code:
        raise RunsError(f"this worker has {here}, and the driver had {spec.code}; install the same code everywhere")
