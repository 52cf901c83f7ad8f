"""Which runs a grid asks for: those of each cell's search, and, once that is done, those that are reported.

A cell is kept in `grid.json` as a plain record, so that a report reads the same plan that the driver carries out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from adapterzoo.ablation.grids.cells import Cell
from adapterzoo.ablation.grids.checking import Size
from adapterzoo.ablation.grids.tune import Point, best
from adapterzoo.ablation.runs.identity import RunSpec, task_options

Role = Literal["tune", "report"]
Metrics = Mapping[str, float]
Lookup = Callable[[str], Metrics | None]
"""Metrics of a run by its name; None if it failed."""


@dataclass(frozen=True)
class CellRecord:
    """A cell as plain values.

    Args:
        cell, generator, wrapper, spec, reference, panel, axes: as `Cell` has them; spec is text.
        task: name and every option.
        metric, maximise: what the search goes by.
        points, tune_seeds: the search; one empty point and no seeds without one.
        edges: for each point, which of its options lie at an end of their range: "min" or "max".
        seeds: of the reported runs.
        data, code: see `RunSpec`.
        size: what trains.
    """

    cell: str
    generator: str
    wrapper: str
    spec: str | None
    reference: bool
    panel: str
    axes: dict[str, Any]
    task: dict[str, Any]
    metric: str
    maximise: bool
    points: list[Point]
    tune_seeds: list[int]
    edges: list[dict[str, str]]
    seeds: list[int]
    data: str
    code: str
    size: dict[str, int]

    def trial(self, point: Point, seed: int) -> RunSpec:
        """A run of the search."""
        return self._run(point, seed, test=False)

    def report(self, point: Point, seed: int) -> RunSpec:
        """A run that is reported."""
        return self._run(point, seed, test=True)

    def trials(self) -> list[tuple[int, RunSpec]]:
        """Every run of the search, with the index of its point."""
        return [(i, self.trial(point, seed)) for seed in self.tune_seeds for i, point in enumerate(self.points)]

    def chosen(self, metrics: Lookup) -> Point | None:
        """The point with the best mean over the tuning seeds; None if no point has all its runs.

        Args:
            metrics: of each run of the search.
        """
        if not self.tune_seeds:
            return self.points[0]
        means = [self._mean(point, metrics) for point in self.points]
        index = best(self.points, means, self.metric, self.maximise)
        return None if index is None else self.points[index]

    def _mean(self, point: Point, metrics: Lookup) -> dict[str, float] | None:
        found = [metrics(self.trial(point, seed).id) for seed in self.tune_seeds]
        if any(values is None for values in found):
            return None
        names = [f"validation/{self.metric}", "validation/loss"]
        return {
            name: float(np.mean([values[name] for values in found if values is not None]))
            for name in names
            if all(values is not None and values.get(name) is not None for values in found)
        }

    def _run(self, point: Point, seed: int, test: bool) -> RunSpec:
        return RunSpec(
            spec=self.spec, task={**self.task, **point}, seed=seed, test=test, data=self.data, code=self.code
        )


def record_of(cell: Cell, seeds: Sequence[int], data: str, code: str, size: Size) -> CellRecord:
    """A cell as it is kept."""
    points = cell.points()
    return CellRecord(
        cell=cell.name,
        generator=cell.generator,
        wrapper=cell.wrapper,
        spec=cell.spec_text,
        reference=cell.reference,
        panel=cell.panel,
        axes=dict(cell.axes),
        task=task_options(cell.task),
        metric=cell.task.metric,
        maximise=cell.task.maximise,
        points=points,
        tune_seeds=list(cell.tune.seeds) if cell.tune else [],
        edges=[cell.tune.edges(point) if cell.tune else {} for point in points],
        seeds=list(seeds),
        data=data,
        code=code,
        size=asdict(size),
    )


@dataclass(frozen=True)
class Planned:
    """One run that a grid asks for."""

    run: RunSpec
    cell: str
    role: Role
    seed: int
    point: Point


def planned(records: Sequence[CellRecord], metrics: Lookup, ended: Callable[[str], bool]) -> list[Planned]:
    """Every run that is known to be asked for: searches, and the reported runs of cells whose search has ended.

    Args:
        records: the cells.
        metrics: see `Lookup`.
        ended: whether a run has ended, well or badly.
    """
    found = []
    for record in records:
        trials = record.trials()
        found += [Planned(run, record.cell, "tune", run.seed, record.points[i]) for i, run in trials]
        if all(ended(run.id) for _, run in trials):
            found += reports(record, metrics)
    return found


def reports(record: CellRecord, metrics: Lookup) -> list[Planned]:
    """The reported runs of a cell whose search has ended; none if all of it failed."""
    point = record.chosen(metrics)
    if point is None:
        return []
    return [Planned(record.report(point, seed), record.cell, "report", seed, point) for seed in record.seeds]
