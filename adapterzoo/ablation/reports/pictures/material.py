"""What pictures and page are made of: the tables of a report, computed once, and the order of what is in them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from adapterzoo.ablation.reports.effects import cells, effects, fronts
from adapterzoo.ablation.reports.results import Results

MOST_PANELS = 24


@dataclass(frozen=True, eq=False)
class Material:
    """A folder of runs and what follows from it.

    Args:
        results: of the folder.
    """

    results: Results

    @cached_property
    def cells(self) -> pd.DataFrame:
        """One row a cell, by the grid's own metric; see `cells`."""
        return cells(self.results)

    @cached_property
    def effects(self) -> pd.DataFrame:
        """One row a comparison, by the grid's own metric; see `effects`."""
        return effects(self.results)

    @cached_property
    def fronts(self) -> pd.DataFrame:
        """One row a cell and cost; see `fronts`."""
        return fronts(self.results)

    @cached_property
    def curves(self) -> pd.DataFrame:
        """What the reported runs that are done logged. Columns: run, step, name, value, cell, seed."""
        runs = self.results.runs
        kept = runs[(runs["role"] == "report") & (runs["status"] == "done")]
        return self.results.curves.merge(kept[["run", "cell", "seed"]], on="run")

    @property
    def generators(self) -> list[str]:
        """In the grid's order, without references."""
        return _labels(self._own, "generator")

    @property
    def wrappers(self) -> list[str]:
        """In the grid's order."""
        return _labels(self._own, "wrapper")

    @property
    def panels(self) -> list[str]:
        """In the grid's order; [""] where no axis varies but spec and wrap."""
        return _labels(self._own, "panel")

    @property
    def drawn(self) -> list[str]:
        """The panels that pictures are made of: the first of very many."""
        return self.panels[:MOST_PANELS]

    @cached_property
    def problems(self) -> Mapping[str, str]:
        """The problem of each cell: only cells of one problem are compared; see `fronts`."""
        return dict(zip(self.fronts["cell"], self.fronts["problem"], strict=True))

    def of_panel(self, panel: str) -> pd.DataFrame:
        """Its cells, without references."""
        return self._own[self._own["panel"] == panel]

    def references(self, panel: str) -> pd.DataFrame:
        """The references of a panel: those whose axes have its values, or are not theirs."""
        table = self.cells[self.cells["reference"].astype(bool)]
        first = self.of_panel(panel).iloc[0]
        fits = [all(_fits(row, first, name) for name in self._axes) for row in table.to_dict("records")]
        return table[np.array(fits, dtype=bool)]

    @property
    def _own(self) -> pd.DataFrame:
        return self.cells[~self.cells["reference"].astype(bool)]

    @property
    def _axes(self) -> Iterator[str]:
        return (f"axis/{name}" for name in self.results.axes)


def _labels(table: pd.DataFrame, column: str) -> list[str]:
    return list(dict.fromkeys(table[column]))


def _fits(row: Mapping[Any, Any], cell: pd.Series, name: str) -> bool:
    return row[name] is None or row[name] == cell[name]
