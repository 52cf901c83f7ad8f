"""A folder of runs as tables: `read` takes what is finished, and changes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from adapterzoo.ablation.grids.axes import BARE
from adapterzoo.ablation.grids.cells import HEAD_ALONE
from adapterzoo.ablation.grids.planned import CellRecord, Metrics, reports
from adapterzoo.ablation.grids.tune import Point
from adapterzoo.ablation.reports import records
from adapterzoo.ablation.runs.store import Store

Curve = tuple[str, int, str, float]


@dataclass(frozen=True, eq=False)
class Results:
    """What a folder of runs holds, of the grid that its `grid.json` describes.

    Args:
        folder: where it was read from.
        grid: the normalised grid.
        metric: that cells are compared by, such as "accuracy"; its columns are "test/accuracy", "validation/accuracy".
        maximise: whether more of it is better.
        percent: whether it is a share.
        reference: the wrapper that others are compared with, "bare".
        tuned: options that were tuned, such as ("lr",).
        runs: one row a run of the grid, whether it has ended or not. Columns: run, status ("done", "failed",
            "missing"), role ("tune", "report"), cell, generator, wrapper, spec, reference, panel, axis/<name>..., seed,
            option/<name>..., edge (which options chosen lie at an end of at least three tried: "lr lowest"), seconds,
            error (one line, "" if none), and one for each metric. `run` is "" where it is not known yet.
        tracebacks: of the runs that failed, by run.
        environments: one row a run that has ended; nested fields as "packages.torch".
        others: finished runs in the folder that are not of this grid; they are not shown.
        problems: files that could not be read, one sentence each; their runs count as failed.
    """

    folder: Path
    grid: Mapping[str, Any]
    metric: str
    maximise: bool
    percent: bool
    reference: str
    tuned: tuple[str, ...]
    runs: pd.DataFrame
    tracebacks: Mapping[str, str]
    environments: pd.DataFrame
    others: int
    problems: tuple[str, ...]

    @property
    def column(self) -> str:
        """The column of `runs` that cells are compared by: the metric on the test part."""
        return f"test/{self.metric}"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The columns of `runs` that hold metrics."""
        columns = list(self.runs)
        return tuple(columns[columns.index("error") + 1 :])

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes beside spec, wrap and seed."""
        return tuple(name.removeprefix("axis/") for name in self.runs if name.startswith("axis/"))

    @cached_property
    def curves(self) -> pd.DataFrame:
        """What the runs logged on their way, read at first use. Columns: run, step, name, value."""
        ended = self.runs.loc[self.runs["status"] != "missing", "run"]
        rows: list[Curve] = []
        for run in ended:
            rows += records.curve(self.folder / run, run)
        table = pd.DataFrame(rows, columns=["run", "step", "name", "value"])
        return table.astype({"step": "int64", "value": "float64", "run": "str", "name": "str"})

    def examples(self, run: str) -> pd.DataFrame:
        """The predictions of a run, one row an example: id, score and whatever else the task kept.

        Args:
            run: its name.

        Returns:
            No rows (columns id, score) where the run has none, or none that can be read.
        """
        return records.examples(self.folder / run)


def read(folder: Path | str) -> Results:
    """Read a folder of runs.

    Args:
        folder: with a `grid.json` and a directory for every run that has ended. Runs that are still going on are
            missing, and a directory that can't be read is a failed run that says so. Which option a cell is reported
            at is known when its search has ended; until then its report runs are missing and have no name.

    Raises:
        RunsError: there is no folder, or it holds no grid that this version can read.
    """
    path = Path(folder)
    grid, cells = records.grid(path)
    known = _Known(Store(path))
    rows = [_row(place, known) for cell in cells for place in _places(cell, known)]
    names = [row["run"] for row in rows if row["status"] != "missing"]
    return Results(
        folder=path,
        grid=grid["grid"],
        metric=grid["metric"],
        maximise=grid["maximise"],
        percent=grid["percent"],
        reference=BARE,
        tuned=tuple(grid["tuned"]),
        runs=_runs(rows),
        tracebacks={run: known(run).traceback for run in names if known(run).status == "failed"},
        environments=_environments(path, names),
        others=len(set(known.store.ended()) - set(names)),
        problems=tuple(known(run).problem for run in names if known(run).problem),
    )


class _Known:
    """How runs ended, each read once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._found: dict[str, records.Ended] = {}

    def __call__(self, run: str) -> records.Ended:
        if run not in self._found:
            self._found[run] = records.ended(self.store, run) if run else records.Ended("missing")
        return self._found[run]

    def metrics(self, run: str) -> Metrics | None:
        """Of a run that is done."""
        found = self(run)
        return found.metrics if found.status == "done" else None


@dataclass(frozen=True)
class _Place:
    """A run of the grid, whether it has ended or not."""

    run: str
    cell: CellRecord
    role: str
    seed: int
    point: Point


def _places(cell: CellRecord, known: _Known) -> list[_Place]:
    trials = [_Place(run.id, cell, "tune", run.seed, cell.points[index]) for index, run in cell.trials()]
    chosen = reports(cell, known.metrics) if all(known(trial.run).status != "missing" for trial in trials) else []
    if not chosen:
        return trials + [_Place("", cell, "report", seed, {}) for seed in cell.seeds]
    return trials + [_Place(planned.run.id, cell, "report", planned.seed, planned.point) for planned in chosen]


def _row(place: _Place, known: _Known) -> dict[str, Any]:
    ended, cell = known(place.run), place.cell
    return {
        "run": place.run,
        "status": ended.status,
        "role": place.role,
        **{name: getattr(cell, name) for name in ("cell", "generator", "wrapper", "reference", "panel")},
        "spec": cell.spec or HEAD_ALONE,
        **{f"axis/{name}": value for name, value in cell.axes.items()},
        "seed": place.seed,
        **{f"option/{name}": value for name, value in place.point.items()},
        "edge": _edge(place) if place.role == "report" else "",
        "seconds": ended.seconds,
        "error": ended.error,
        "metrics": ended.metrics,
    }


def _edge(place: _Place) -> str:
    """Which chosen options lie at an end of those tried; of one or two points all do, which says nothing."""
    points = place.cell.points
    ends = place.cell.edges[points.index(place.point)] if place.point in points and len(points) > 2 else {}
    return ", ".join(f"{name} {'lowest' if end == 'min' else 'highest'}" for name, end in ends.items())


def _environments(folder: Path, runs: list[str]) -> pd.DataFrame:
    table = pd.json_normalize([records.environment(folder / run, run) for run in runs])
    return table if runs else pd.DataFrame({"run": pd.Series(dtype="str")})


_FIRST = ("run", "status", "role", "cell", "generator", "wrapper", "spec", "reference", "panel")
_LAST = ("edge", "seconds", "error")


def _runs(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Fixed columns first, axes and options in their places, metrics last and always numbers."""
    metrics = [row.pop("metrics") for row in rows]
    table = pd.DataFrame(rows, columns=None if rows else [*_FIRST, "seed", *_LAST])
    axes = [name for name in table if name.startswith("axis/")]
    options = [name for name in table if name.startswith("option/")]
    for name in axes:  # as the grid has them: 2 stays 2 though references have no rank
        table[name] = pd.Series([row.get(name) for row in rows], index=table.index, dtype=object)
    first = [*_FIRST, *axes, "seed", *options, *_LAST]
    # A metric may bear the name of a column of its own ("seconds"); then it is set apart.
    taken = set(first)
    renamed = [{f"metric/{name}" if name in taken else name: value for name, value in run.items()} for run in metrics]
    numbers = pd.DataFrame(renamed, index=table.index).astype("float64")
    return pd.concat([table[first], numbers], axis=1)
