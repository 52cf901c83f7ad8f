"""Runs on worker processes: tune every cell, then report it on paired seeds."""

import signal
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Literal

import pandas as pd
import torch

from adapterzoo.ablation.cells import Cell
from adapterzoo.ablation.summary import best_rates
from adapterzoo.ablation.transformer import State
from adapterzoo.ablation.trial import Record, run

TUNING_SEED = 100
REPORTED_SEEDS = (1, 2, 3)

Outcome = Record | BaseException


@dataclass(frozen=True)
class Job:
    """One run to do."""

    cell: Cell
    lr: float
    seed: int
    role: Literal["tune", "report"]

    def __str__(self) -> str:
        return f"{self.cell.name}, learning rate {self.lr:g}, seed {self.seed} ({self.role})"


Work = Callable[[Job, State], Record]
Told = Callable[[Job, Outcome], None]


def pool(workers: int) -> ProcessPoolExecutor:
    """Worker processes of one thread each."""
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)


def work(job: Job, base: State) -> Record:
    """Do a job. Only a run that is reported sees the test set."""
    return run(job.cell.spec, job.lr, job.seed, base, test=job.role == "report")


def run_jobs(executor: Executor, work: Work, jobs: Sequence[Job], base: State, told: Told) -> dict[Job, Record]:
    """Do all the jobs, tell of each as it ends, and give back those that did not fail, in the order of `jobs`."""
    futures: dict[Future[Record], Job] = {}
    done: dict[Job, Record] = {}
    try:
        for job in jobs:
            try:
                futures[executor.submit(work, job, base)] = job
            except BrokenExecutor as error:  # a worker was killed, and the pool takes no more jobs
                told(job, error)
        for future in as_completed(futures):
            outcome = future.exception() or future.result()
            if isinstance(outcome, Record):
                done[futures[future]] = outcome
            told(futures[future], outcome)
    except BaseException:
        executor.shutdown(cancel_futures=True)
        raise
    return {job: done[job] for job in jobs if job in done}


def tuning_jobs(cells: Sequence[Cell]) -> list[Job]:
    """Every learning rate of every cell, on the one seed that is not reported."""
    return [Job(cell, lr, TUNING_SEED, "tune") for cell in cells for lr in cell.rates]


def report_jobs(cells: Sequence[Cell], tuned: dict[Job, Record]) -> list[Job]:
    """Every cell at its best learning rate, on the reported seeds; a cell without a tuned one has no jobs."""
    rates = best_rates(results_frame(tuned)) if tuned else {}
    return [
        Job(cell, rates[cell.name], seed, "report") for cell in cells if cell.name in rates for seed in REPORTED_SEEDS
    ]


def results_frame(done: dict[Job, Record]) -> pd.DataFrame:
    """One row a run: what was run, and what came out, without the curves."""
    rows = []
    for job, record in done.items():
        outcome = {name: value for name, value in asdict(record).items() if name != "curve"}
        rows.append({**_labels(job), "spec": job.cell.spec or "", "role": job.role, **outcome})
    return pd.DataFrame(rows)


def curves_frame(done: dict[Job, Record]) -> pd.DataFrame:
    """One row a point of the training curves of the reported runs."""
    return pd.DataFrame(
        [
            {**_labels(job), **asdict(point)}
            for job, record in done.items()
            if job.role == "report"
            for point in record.curve
        ]
    )


def _labels(job: Job) -> dict[str, object]:
    cell = job.cell
    return {"cell": cell.name, "generator": cell.generator, "wrapper": cell.wrapper, "seed": job.seed, "lr": job.lr}


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
