"""All the runs of a study on worker processes: what is done already is skipped, what is done now is kept and told."""

import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from time import perf_counter
from typing import Any

import torch

from studies.arms import Arm, Job, Settings, report_jobs, tuning_jobs
from studies.lab import real_lab
from studies.store import Store
from studies.trial import run

Outcome = dict[str, Any]
Work = Callable[[Job, Settings], Outcome]


def pool(workers: int) -> ProcessPoolExecutor:
    """Worker processes of one thread each."""
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)


def work(job: Job, settings: Settings) -> Outcome:
    """Do a job in this process."""
    return run(job, real_lab(settings))


@dataclass
class Progress:
    """A line for every run: what came out, how many are done, and about how long the rest takes.

    Args:
        say: prints a line.
        total: how many runs the study has.
    """

    say: Callable[[str], None]
    total: int
    done: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    _start: float = field(default_factory=perf_counter)

    def skip(self) -> None:
        """Take in a run that was found."""
        self.done, self.skipped = self.done + 1, self.skipped + 1

    def told(self, job: Job, outcome: Outcome | BaseException) -> None:
        """Take in how a run ended."""
        self.done += 1
        if isinstance(outcome, BaseException):
            self.failures.append(f"{job}: {type(outcome).__name__}: {outcome}")
            self.say(f"failed: {self.failures[-1]}")
            return
        self.say(f"[{self.done}/{self.total}] {job}: {_found(outcome)}; {self._left()} left")

    def _left(self) -> str:
        pace = (perf_counter() - self._start) / (self.done - self.skipped)
        return f"about {pace * (self.total - self.done) / 60:.0f} min"


def run_study(
    arms: tuple[Arm, ...], settings: Settings, data: str, store: Store, executor: Executor, say: Callable[[str], None],
    work: Work = work,
) -> tuple[list[Outcome], Progress]:  # fmt: skip
    """Tune every arm, then do the reported runs: the outcomes of all runs, and how it went."""
    tuning = tuning_jobs(arms)
    total = len(tuning) + sum(len(arm.seeds) for arm in arms)
    progress = Progress(say, total)

    def do(jobs: Sequence[Job]) -> list[Outcome]:
        return run_jobs(jobs, settings, data, store, executor, progress, work)

    tuned = do(tuning)
    return tuned + do(report_jobs(arms, best_rates(tuned))), progress


def run_jobs(
    jobs: Sequence[Job], settings: Settings, data: str, store: Store, executor: Executor, progress: Progress, work: Work
) -> list[Outcome]:
    """The outcomes of these jobs, in their order, without those that failed."""
    found: dict[Job, Outcome] = {}
    futures: dict[Future[Outcome], Job] = {}
    for job in jobs:
        known = store.find(job.key, job.identity(settings, data))
        if known is None:
            futures[executor.submit(work, job, settings)] = job
        else:
            found[job] = known
            progress.skip()
    try:
        for future in as_completed(futures):
            job, failure = futures[future], future.exception()
            if failure is None:
                found[job] = future.result()
                store.keep(job.key, job.identity(settings, data), found[job])
            progress.told(job, failure or found[job])
    except BaseException:
        executor.shutdown(cancel_futures=True)
        raise
    return [found[job] for job in jobs if job in found]


def best_rates(tuned: Sequence[Outcome]) -> dict[str, float]:
    """The learning rate of every arm: the best mean reciprocal rank on the validation set; of equal ones the lowest."""
    best: dict[str, Outcome] = {}
    for outcome in sorted(tuned, key=lambda outcome: (-outcome["mrr"], outcome["lr"])):
        best.setdefault(outcome["arm"], outcome)
    return {arm: outcome["lr"] for arm, outcome in best.items()}


def _found(outcome: Outcome) -> str:
    return f"accuracy {100 * outcome['accuracy']:.1f} %, MRR {outcome['mrr']:.3f}, {outcome['run_seconds']:.0f} s"


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
