"""Jobs of submitit: what they do, and how they have ended."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import submitit

from adapterzoo.ablation.engines.calling import call, writing_to
from adapterzoo.ablation.engines.child import trace_crashes
from adapterzoo.ablation.engines.endings import last_words
from adapterzoo.ablation.engines.engine import Order

# The scheduler may say this of a job that will yet run again.
IN_DOUBT = ("UNKNOWN", "PREEMPTED")


@dataclass
class Carry:
    """What a job does; submitit keeps it in a file.

    Args:
        perform: as "module:function".
        path: where the driver finds modules.
    """

    perform: str
    path: list[str]
    leaving: bool = field(default=False, compare=False)

    def __call__(self, payload: Mapping[str, Any]) -> str | None:
        """Carry an order out; the sentence of what went wrong is the job's result."""
        sys.path += [entry for entry in self.path if entry not in sys.path]
        trace_crashes()
        with writing_to(payload.get("output")):
            # submitit leaves by sys.exit when it has asked for the job to be requeued
            return call(self.perform, payload, lambda: self.leaving)

    def checkpoint(self, payload: Mapping[str, Any]) -> "submitit.helpers.DelayedSubmission":
        """What is to be done after a preemption or at the end of the job's time: the same run, from its beginning."""
        self.leaving = True
        return submitit.helpers.DelayedSubmission(Carry(self.perform, self.path), payload)


@dataclass
class Job:
    """An order with the scheduler.

    Args:
        order: what it does.
        job: submitit's.
        doubted: since when the scheduler has had nothing to say of it.
        over: since when it is known to have ended, its result not yet seen.
    """

    order: Order
    job: "submitit.Job[str | None]"
    doubted: float | None = None
    over: float | None = None

    def has_result(self) -> bool:
        """Whether what it gave can be read."""
        if isinstance(self.job, submitit.SlurmJob):
            return bool(self.job.paths.result_pickle.exists())
        return bool(self.job.done() and (self._is_debug() or self.job.paths.result_pickle.exists()))

    def problem(self) -> str | None:
        """Why it did not do what it was to do; None if it did."""
        error = None if self._is_debug() else self.job.exception()
        return self.job.result() if error is None else _end_of_trace(str(error))

    def judge(self, now: float, state: str, finished: bool, lost_after: float, grace: float) -> str | None:
        """What to make of what the scheduler says of a job without a result; None to wait on.

        Args:
            now: seconds on some clock.
            state: as the scheduler calls it.
            finished: whether that means that it has ended.
            lost_after, grace: see `SlurmOptions`.
        """
        doubted, over = state.upper() in IN_DOUBT, finished
        self.doubted = (now if self.doubted is None else self.doubted) if doubted else None
        self.over = (now if self.over is None else self.over) if over else None
        if self.doubted is not None and now - self.doubted >= lost_after:
            return f"job {self.job.job_id} is lost: for {now - self.doubted:.0f} s it has been {state}"
        if self.over is not None and now - self.over >= grace:
            words = last_words(self.order.payload.get("output")) or last_words(self.job.paths.stderr)
            return f"job {self.job.job_id} ended as {state} before it was done{words}"
        return None

    def tidy(self) -> None:
        """Remove submitit's files of it."""
        paths = self.job.paths
        for path in (paths.submitted_pickle, paths.result_pickle, paths.stdout, paths.stderr):
            with suppress(OSError):
                path.unlink()

    def _is_debug(self) -> bool:
        return isinstance(self.job, submitit.DebugJob)


def _end_of_trace(text: str) -> str:
    """The line of a trace that says what was raised."""
    trace = [part for part in text.split("-" * 22) if part.strip()]
    lines = trace[min(1, len(trace) - 1)].strip().splitlines()
    return f"its job failed: {lines[-1].strip()}"
