"""A small real ablation, from end to end: `python -m adapterzoo.ablation.demo`.

17 cells (a frozen base, full fine-tuning, and {LoRA, AdaLoRA, FLoRA} under no wrapper, MAP, DoRA, PreDiag and
SORA(PreDiag)) on one task: a transformer pretrained on the digits 0 to 4 is adapted to the digits 5 to 9. For every
cell 3 learning rates are tried on one seed, and the best of them runs on 3 other seeds: 102 runs.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from adapterzoo.ablation import figures
from adapterzoo.ablation.cells import Cell, all_cells
from adapterzoo.ablation.report import CAVEATS, cell_table
from adapterzoo.ablation.schedule import (
    REPORTED_SEEDS,
    Job,
    Outcome,
    curves_frame,
    pool,
    report_jobs,
    results_frame,
    run_jobs,
    tuning_jobs,
    work,
)
from adapterzoo.ablation.summary import summarise
from adapterzoo.ablation.transformer import pretrain
from adapterzoo.ablation.trial import Record

FILES = ("results.csv", "summary.csv", "curves.csv", "heatmap.png", "curves.png")


class Watch:
    """Live progress: runs done, the time that is left, the best cell so far, and every failure by name."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.failures: list[str] = []
        self._best = (0.0, "")
        self._progress = progress
        self._task = progress.add_task("pretraining the base", total=total, best="")

    def stage(self, text: str) -> None:
        """Say what is being done."""
        self._progress.update(self._task, description=text)

    def told(self, job: Job, outcome: Outcome) -> None:
        """Take in how a run ended."""
        if isinstance(outcome, Record):
            self._best = max(self._best, (outcome.val_accuracy, job.cell.name))
        else:
            self.failures.append(f"{job}: {type(outcome).__name__}: {outcome}")
            self._progress.console.print(f"failed: {self.failures[-1]}", style="red", markup=False)
        best = f"best single validation {100 * self._best[0]:.1f} %: {self._best[1]}" if self._best[1] else ""
        self._progress.update(self._task, advance=1, best=best)


def run_all(cells: Sequence[Cell], workers: int, console: Console) -> tuple[dict[Job, Record], list[str]]:
    """Pretrain, tune, report: every run that did not fail, and the failures as text."""
    tuning = tuning_jobs(cells)
    with _progress(console) as progress, pool(workers) as executor:
        watch = Watch(progress, len(tuning) + len(cells) * len(REPORTED_SEEDS))
        base = executor.submit(pretrain).result()
        watch.stage("tuning learning rates")
        tuned = run_jobs(executor, work, tuning, base, watch.told)
        watch.stage("reported seeds")
        reported = run_jobs(executor, work, report_jobs(cells, tuned), base, watch.told)
        watch.stage("done")
    return {**tuned, **reported}, watch.failures


def write(done: dict[Job, Record], folder: Path, console: Console) -> None:
    """Print the table, and write the files; those of an earlier run go, lest the two be mixed."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    results, points = results_frame(done), curves_frame(done)
    results.to_csv(folder / "results.csv", index=False)
    if points.empty:
        console.print("no cell got as far as its reported runs", style="red")
        return
    summary = summarise(results)
    summary.to_csv(folder / "summary.csv", index=False)
    points.to_csv(folder / "curves.csv", index=False)
    figures.heatmap(summary, folder / "heatmap.png")
    figures.curves(points, folder / "curves.png")
    console.print(cell_table(summary))
    console.print(CAVEATS, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status is 1 if a run failed, 2 for bad arguments, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="python -m adapterzoo.ablation.demo", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for the results (default: runs/demo)"
    )
    parser.add_argument("--workers", type=int, default=2, help="worker processes, of one thread each (default: 2)")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: at least one is needed")
    problem = unwritable(args.out)
    if problem is not None:
        parser.error(f"--out {args.out}: {problem}")
    # Piped into a file, there is no width to fit: wide enough for the table.
    console = Console(width=None if sys.stdout.isatty() else 100)
    start = perf_counter()
    try:
        done, failures = run_all(all_cells(), args.workers, console)
    except KeyboardInterrupt:
        console.print("interrupted; nothing was written")
        return 130
    write(done, args.out, console)
    console.print(
        f"\n{len(done)} runs in {perf_counter() - start:.0f} s on {args.workers} workers ({os.cpu_count()} cores, "
        f"torch {torch.__version__}). Files: {args.out}",
        highlight=False,
    )
    for failure in failures:
        console.print(f"failed: {failure}", style="red", markup=False)
    return 1 if failures else 0


def unwritable(folder: Path) -> str | None:
    """Make the folder, and say why it can't be written to; None if it can. Asked before minutes of work, not after."""
    probe = folder / ".probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"it can't be written to ({error.strerror})"
    return None


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[best]}"),
        console=console,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
