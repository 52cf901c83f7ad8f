"""Write the tables of a report into docs/studies/wrappers.md: `python -m studies.wrappers`.

`make study-wrappers` runs the grid studies/wrappers.yaml, writes its report into docs/studies/wrappers, and calls this.
A table stands between `<!-- table: name -->` and `<!-- end -->`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from adapterzoo.ablation.reports.texts import bounds, difference_of, effect, mean_of, options_of, probability, verdict
from benchmarks.machine import ROOT
from studies.page import Rows, table

PAGE = ROOT / "docs" / "studies" / "wrappers.md"
DATA = ROOT / "docs" / "studies" / "wrappers"
_PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str, data: Path = DATA) -> str:
    """The page with every table as the report has it.

    Args:
        page: its text.
        data: the folder of the report.
    """
    return _PLACE.sub(lambda place: place[1] + table(TABLES[place[2]](data)) + "\n" + place[3], page)


def primary(data: Path) -> Rows:
    """The wrappers, each seed's difference averaged over generators."""
    rows = [
        [row["wrapper"], str(row["n"]), difference_of(row, percent=True), _examples(row), effect(row["d_z"]),
         probability(row["p"]), probability(row["p_adjusted"]), verdict(row)]
        for row in _effects(data, "primary")
    ]  # fmt: skip
    header = ["wrapper", "seeds", "MRR, points", "over docstrings", "d_z", "p", "p, Holm (m = 4)", ""]
    return [header, *rows]


def secondary(data: Path) -> Rows:
    """Every cell against its bare generator."""
    rows = [
        [row["generator"], row["wrapper"], difference_of(row, percent=True), _examples(row), probability(row["p"]),
         probability(row["p_adjusted"]), verdict(row)]
        for row in _effects(data, "secondary")
    ]  # fmt: skip
    return [["generator", "wrapper", "MRR, points", "over docstrings", "p", "p, BH (m = 12)", ""], *rows]


def cells(data: Path) -> Rows:
    """Every cell by itself."""
    rows = [
        [row["generator"], row["wrapper"], options_of(row), mean_of(row, percent=True),
         f"{row['adapter_parameters']:,.0f}", f"{row['ms_per_step']:.0f}" if row["ms_per_step"] > 0 else ""]
        for row in _rows(data, "cells")
        if row["metric"] == "test/mrr"
    ]  # fmt: skip
    return [["generator", "wrapper", "learning rate", "test MRR in %", "parameters", "ms a step"], *rows]


def cost(data: Path) -> Rows:
    """How many runs there were, how long they took, and where."""
    runs = pd.read_csv(data / "runs.csv")
    places = pd.read_csv(data / "environments.csv")
    first = places.iloc[0]
    failed = int((runs["status"] == "failed").sum())
    return [
        ["runs", "failed", "hours of one core", "machine", "torch", "transformers", "python"],
        [str(len(runs)), str(failed), f"{runs['seconds'].sum() / 3600:.2f}", f"{first['cpu.model']}, 2 workers",
         *(str(first[name]) for name in ("packages.torch", "packages.transformers", "python"))],
    ]  # fmt: skip


TABLES: dict[str, Callable[[Path], Rows]] = {
    "primary": primary, "secondary": secondary, "cells": cells, "cost": cost,
}  # fmt: skip


def _effects(data: Path, family: str) -> list[dict[Any, Any]]:
    return [row for row in _rows(data, "effects") if row["family"] == family and row["metric"] == "test/mrr"]


def _rows(data: Path, name: str) -> list[dict[Any, Any]]:
    found: list[dict[Any, Any]] = pd.read_parquet(data / f"{name}.parquet").to_dict("records")
    return found


def _examples(row: dict[Any, Any]) -> str:
    return bounds(row["example_low"], row["example_high"], percent=True, signed=True)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
