"""Runs as jobs of Slurm, through submitit: arrays, polling that spares the scheduler, and jobs that are requeued."""

import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import submitit

from adapterzoo.ablation.engines.calling import folder_of
from adapterzoo.ablation.engines.engine import Ended, Order
from adapterzoo.ablation.engines.jobs import Carry, Job
from adapterzoo.ablation.engines.slurm_options import SlurmOptions, check_accounting, make_executor
from adapterzoo.errors import RunsError, count

_LOOK, _LOOK_HERE = 1.0, 0.05
_TRIES = 6


class SlurmEngine:
    """Submits orders as jobs, and looks for how they end.

    Args:
        options: see `SlurmOptions`.

    Raises:
        GridError: options that submitit or Slurm does not take, or no Slurm here.
    """

    name: ClassVar[str] = "slurm"
    Options: ClassVar = SlurmOptions

    def __init__(self, options: SlurmOptions | None = None) -> None:
        self._options = options or SlurmOptions()
        self._real = self._options.cluster == "slurm"
        self.capacity = self._options.workers
        self._waiting: list[Order] = []
        self._due = 0.0
        self._refused = 0
        self._jobs: list[Job] = []
        self._asked = -float("inf")
        self._executor: submitit.AutoExecutor | None = None
        with tempfile.TemporaryDirectory() as nowhere:  # says what is wrong before anything is submitted
            make_executor(self._options, Path(nowhere))
        if self._real:
            check_accounting()

    def submit(self, order: Order) -> None:
        """Take an order; it becomes a job with those that come soon after it."""
        if not self._waiting:
            self._due = time.monotonic() + (self._options.gather if self._real and self._jobs else 0.0)
        self._waiting.append(order)

    def wait(self, timeout: float) -> Sequence[Ended]:
        """Orders whose job has ended.

        Raises:
            RunsError: the scheduler takes no jobs, for minutes.
        """
        deadline = time.monotonic() + timeout
        while True:
            self._hand_over()
            found = self._look()
            left = deadline - time.monotonic()
            if found or left <= 0 or not (self._waiting or self._jobs):
                return found
            time.sleep(min(left, _LOOK if self._real else _LOOK_HERE))

    def close(self) -> None:
        """Cancel every job."""
        self._waiting.clear()
        jobs, self._jobs = [item.job for item in self._jobs], []
        cancel(jobs)
        end = time.monotonic() + self._options.grace
        while time.monotonic() < end and any(isinstance(job, submitit.LocalJob) and not job.done() for job in jobs):
            time.sleep(_LOOK_HERE)

    def _hand_over(self) -> None:
        """Submit what was gathered, as one array; a scheduler that takes nothing is asked again, later and later."""
        if not self._waiting or time.monotonic() < self._due:
            return
        try:
            self._jobs += self._submitted(self._waiting)
        except (OSError, subprocess.SubprocessError, submitit.core.utils.FailedJobError) as error:
            self._refused += 1
            if self._refused == _TRIES:
                raise RunsError(
                    f"Slurm did not take {count(len(self._waiting), 'job')}, asked {_TRIES} times: {error}. Jobs that "
                    "ran are cancelled, finished runs are whole; the same command goes on from there"
                ) from error
            self._due = time.monotonic() + self._options.gather * 2**self._refused
            return
        self._waiting, self._refused = [], 0

    def _submitted(self, orders: Sequence[Order]) -> list[Job]:
        if self._executor is None:
            folder = self._options.logs or (folder_of(orders[0].payload) or Path()) / "submitit"
            self._executor = make_executor(self._options, folder)
        carry = Carry(self._options.perform, [entry for entry in sys.path if entry])
        with interruptible(), self._executor.batch():
            jobs = [self._executor.submit(carry, order.payload) for order in orders]
        return [Job(order, job) for order, job in zip(orders, jobs, strict=True)]

    def _look(self) -> list[Ended]:
        """Results are files and cost little to look for; the scheduler is asked now and then."""
        now = time.monotonic()
        asking = now - self._asked >= (self._options.poll if self._real else 0.0)
        if asking:
            self._asked = now
            if self._real and self._jobs:
                submitit.SlurmJob.watcher.update()
        found, left = [], []
        for job in self._jobs:
            ended = self._ended(job, now, asking)
            found += [ended] if ended else []
            left += [] if ended else [job]
        self._jobs = left
        return found

    def _ended(self, job: Job, now: float, asking: bool) -> Ended | None:
        if job.has_result():
            ended = Ended(job.order.key, job.problem())
            if ended.problem is None:
                job.tidy()
            return ended
        if not asking:
            return None
        state, finished = self._state(job)
        grace = self._options.grace if self._real else 0.0
        problem = job.judge(now, state, finished, self._options.lost_after, grace)
        if problem is None:
            return None
        if self._real and not finished:
            cancel([job.job])
        return Ended(job.order.key, problem)

    def _state(self, job: Job) -> tuple[str, bool]:
        if not self._real:
            return job.job.state, job.job.done()
        watcher, name = job.job.watcher, job.job.job_id
        return watcher.get_state(name, mode="cache"), watcher.is_done(name, mode="cache")


@contextmanager
def interruptible() -> Iterator[None]:
    """Processes started in here take an interrupt, by which submitit's local executor cancels its jobs.

    A driver that was itself started in the background ignores interrupts, and whatever it starts would inherit that.
    """
    if (
        signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def cancel(jobs: Sequence["submitit.Job[str | None]"]) -> None:
    """Cancel jobs: Slurm's by one command."""
    names = [job.job_id for job in jobs if isinstance(job, submitit.SlurmJob)]
    if names:
        subprocess.run(["scancel", *names], check=False)
    for job in jobs:
        if job.job_id not in names:
            with suppress(OSError):
                job.cancel(check=False)
