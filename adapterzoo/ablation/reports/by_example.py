"""The other interval: over the examples of the test part, for the seeds that were run."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from adapterzoo.ablation.reports.pairs import Pairs, Runs
from adapterzoo.ablation.reports.results import Results
from adapterzoo.ablation.reports.statistics import BCA_FROM, Interval, Values, all_equal, bca_interval

NONE = Interval(math.nan, math.nan, math.nan, "")
# How far the mean of float32 scores may be from the metric, relative to its size, to be the same number.
_SAME = 1e-5


class Examples:
    """The scores of runs, each file read once.

    Args:
        results: of a folder of runs.
        runs: the report runs by cell and seed.
    """

    def __init__(self, results: Results, runs: Runs) -> None:
        self._results = results
        self._runs = runs
        self._scores: dict[tuple[str, int], pd.Series | None] = {}

    def interval(self, pairs: Pairs) -> tuple[Interval, int, str]:
        """BCa interval of the difference over examples: the scores' differences, averaged over seeds first.

        Cells with the same examples are averaged example by example; those with others (another data set) are strata,
        each drawn from by itself and weighted by its cells.

        Args:
            pairs: the comparison.

        Returns:
            The interval, the number of examples, and why there is no interval ("" if there is one).
        """
        if not pairs.seeds:
            return NONE, 0, ""
        cells = [self._differences(ours, bare, pairs.seeds) for ours, bare in pairs.cells]
        if any(cell is None for cell in cells):
            return NONE, 0, "no interval over examples: their scores are not there, or their mean is not the metric"
        strata = _strata(cell for cell in cells if cell is not None)
        size = sum(len(values) for values, _ in strata)
        if min(len(values) for values, _ in strata) < BCA_FROM:
            return NONE, size, f"no interval over examples: fewer than {BCA_FROM}"
        return _interval(strata, pairs.scale), size, ""

    def _differences(self, ours: str, bare: str, seeds: Sequence[int]) -> pd.Series | None:
        """Scores of a cell less those of its bare one, by example, averaged over seeds."""
        found = []
        for seed in seeds:
            sides = [self._read(ours, seed), self._read(bare, seed)]
            if sides[0] is None or sides[1] is None or not sides[0].index.equals(sides[1].index):
                return None
            found.append(sides[0] - sides[1])
        same = all(values.index.equals(found[0].index) for values in found)
        return sum(found[1:], found[0]) / len(found) if same else None

    def _read(self, cell: str, seed: int) -> pd.Series | None:
        """Scores of a run by example, of which the metric is the mean; None where that is not so.

        Where the metric is the mean's negative (a loss), so are the scores.
        """
        if (cell, seed) not in self._scores:
            run = self._runs[cell][seed]
            table = self._results.examples(run.run).sort_values("id")
            scores = pd.Series(table["score"].to_numpy(dtype=float), index=table["id"].to_numpy())
            self._scores[cell, seed] = _signed(scores, run.value)
        return self._scores[cell, seed]


def _signed(scores: pd.Series, metric: float) -> pd.Series | None:
    if scores.empty or scores.isna().any() or not scores.index.is_unique:
        return None
    near = _SAME * max(abs(metric), float(scores.abs().max()))
    if abs(scores.mean() - metric) <= near:
        return scores
    return -scores if abs(scores.mean() + metric) <= near else None


def _strata(cells: Iterable[pd.Series]) -> list[tuple[Values, int]]:
    """Cells with the same examples, averaged: (differences, how many cells) each."""
    groups: list[list[pd.Series]] = []
    for cell in cells:
        group = next((group for group in groups if group[0].index.equals(cell.index)), None)
        if group is None:
            groups.append([cell])
        else:
            group.append(cell)
    return [(np.mean([cell.to_numpy() for cell in group], axis=0), len(group)) for group in groups]


def _interval(strata: Sequence[tuple[Values, int]], scale: float) -> Interval:
    total = sum(cells for _, cells in strata)
    fixed = sum(cells / total * values.mean() for values, cells in strata if all_equal(values, scale))
    varied = [(values, cells / total) for values, cells in strata if not all_equal(values, scale)]
    if not varied:
        return Interval(float(fixed), float(fixed), float(fixed), "equal")
    found = bca_interval([values for values, _ in varied], [weight for _, weight in varied])
    return Interval(found.mean + fixed, found.low + fixed, found.high + fixed, found.method)
