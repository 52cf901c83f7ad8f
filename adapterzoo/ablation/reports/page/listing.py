"""The tables of the page: what stands in each, and what it is sorted by."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from adapterzoo.ablation.reports import texts
from adapterzoo.ablation.reports.pictures.material import Material
from adapterzoo.ablation.reports.statistics import too_small
from adapterzoo.ablation.reports.tables import effect_title
from adapterzoo.errors import count

MOST_RUNS = 2_000
_MOST_NAMED = 50
_MOST_FAILURES = 100
_LONGEST = 20_000
_UNFINISHED_FIRST = {"failed": 0, "missing": 1, "done": 2}
Row = Mapping[Any, Any]


@dataclass(frozen=True)
class Entry:
    """One place of a table.

    Args:
        text: that is shown.
        key: that it is sorted by, if not the text; None comes last, whatever the order.
        kind: "number" (to the right), "tight" (in one line), "wide" (sentences) or "".
    """

    text: str
    key: float | str | None
    kind: str = ""


@dataclass(frozen=True)
class Column:
    """A column.

    Args:
        name: its header.
        entries: one a row.
        filtered: whether rows can be chosen by it.
    """

    name: str
    entries: Sequence[Entry]
    filtered: bool = False

    @property
    def number(self) -> bool:
        """Whether it holds numbers."""
        return any(entry.kind == "number" for entry in self.entries)


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Args:
        name: in its place's address.
        caption: what it shows.
        columns: all of one length.
    """

    name: str
    caption: str
    columns: Sequence[Column]

    @property
    def rows(self) -> list[tuple[Entry, ...]]:
        """The entries, row by row."""
        return list(zip(*(column.entries for column in self.columns), strict=True))


def cells_table(material: Material) -> Table:
    """Every cell: what it reached, what it costs, how many of its runs ended.

    Args:
        material: of the report.
    """
    rows: list[Row] = material.cells.to_dict("records")
    percent, effects = material.results.percent, _by_cell(material)
    columns = [
        _words("cell", (row["cell"] for row in rows)),
        _words("generator", (row["generator"] for row in rows), filtered=True),
        _words("wrapper", (row["wrapper"] for row in rows), filtered=True),
        _words("panel", (row["panel"] for row in rows), filtered=True),
        _numbers(material.results.column, ((texts.mean_of(row, percent), row["mean"]) for row in rows)),
        _numbers("against bare", (_against(effects.get(row["cell"]), percent) for row in rows)),
        _numbers("n", ((str(row["n"]), row["n"]) for row in rows)),
        _words("chosen", (texts.options_of(row) for row in rows), kind="tight"),
        _numbers("parameters", _quantities(rows, "adapter_parameters")),
        _numbers("head", _quantities(rows, "head_parameters")),
        _numbers("ms a step", ((texts.amount(row["ms_per_step"], False), row["ms_per_step"]) for row in rows)),
        _numbers("MiB", ((_mebibytes(row["memory_bytes"]), row["memory_bytes"]) for row in rows)),
        _words("note", (row["note"] for row in rows), kind="wide"),
    ]
    unit = " in %" if percent else ""
    said = f"{count(len(rows), 'cell')}: {material.results.column}{unit}, mean and 95 % interval over seeds"
    return Table("cells", said, _telling(columns))


def effects_tables(material: Material) -> list[Table]:
    """The primary family, then the single cells.

    Args:
        material: of the report.
    """
    families = material.effects.groupby("family", sort=False)
    return [_effects(material, str(family), own) for family, own in families]


def _effects(material: Material, family: str, table: pd.DataFrame) -> Table:
    rows, percent = table.to_dict("records"), material.results.percent
    correction = table["correction"].iloc[0]
    columns = [
        _words("wrapper", (row["wrapper"] for row in rows), filtered=family == "secondary"),
        _words("generator", (row["generator"] for row in rows), filtered=True),
        _words("panel", (row["panel"] for row in rows), filtered=True),
        _numbers("n", ((str(row["n"]), row["n"]) for row in rows)),
        _numbers("difference [over seeds]", ((texts.difference_of(row, percent), row["difference"]) for row in rows)),
        _numbers("[over examples]", ((_over_examples(row, percent), row["example_low"]) for row in rows)),
        _numbers("d_z", ((texts.effect(row["d_z"]), row["d_z"]) for row in rows)),
        _numbers("p", ((texts.probability(row["p"]), row["p"]) for row in rows)),
        _numbers(f"p ({correction})", ((texts.probability(row["p_adjusted"]), row["p_adjusted"]) for row in rows)),
        _words("verdict", (_verdict(row) for row in rows), kind="tight"),
        _words("note", (_note(row) for row in rows), kind="wide"),
    ]
    return Table(f"effects-{family}", effect_title(table, material.results), _telling(columns))


def runs_table(material: Material) -> Table:
    """The runs, those that failed or are missing first; of very many the page shows some.

    Args:
        material: of the report.
    """
    every = material.results.runs
    order = every["status"].map(_UNFINISHED_FIRST).sort_values(kind="stable").index
    shown = every.loc[order[:MOST_RUNS]] if len(every) > MOST_RUNS else every
    rows: list[Row] = shown.to_dict("records")
    options = [name for name in every if str(name).startswith("option/")]
    metrics = [name for name in material.results.metrics if name.startswith(("test/", "validation/"))]
    columns = [
        _words("run", (row["run"] for row in rows)),
        _words("cell", (row["cell"] for row in rows)),
        _words("generator", (row["generator"] for row in rows), filtered=True),
        _words("wrapper", (row["wrapper"] for row in rows), filtered=True),
        _words("panel", (row["panel"] for row in rows), filtered=True),
        _words("role", (row["role"] for row in rows), filtered=True),
        _words("status", (row["status"] for row in rows), filtered=True),
        _numbers("seed", ((str(row["seed"]), row["seed"]) for row in rows)),
        *(_mixed(str(name).removeprefix("option/"), (row[name] for row in rows)) for name in options),
        *(_metric(name, rows, material) for name in metrics),
        _numbers("seconds", ((texts.amount(row["seconds"], False), row["seconds"]) for row in rows)),
        _words("error", (row["error"] for row in rows), kind="wide"),
    ]
    said = f"{count(len(every), 'run')}"
    if len(shown) < len(every):
        said = f"{len(shown):,} of {said}, those that failed or are missing first; runs.csv has all"
    return Table("runs", said, _telling(columns))


@dataclass(frozen=True)
class Failure:
    """Runs that ended with one error.

    Args:
        error: in a line.
        runs: cell, role, seed and name of each.
        traceback: of the first.
    """

    error: str
    runs: tuple[str, ...]
    traceback: str

    @property
    def count(self) -> str:
        """How many they are."""
        return count(len(self.runs), "run")

    @property
    def shown(self) -> tuple[str, ...]:
        """The first of them."""
        return self.runs[:_MOST_NAMED]

    @property
    def more(self) -> str:
        """That there are more."""
        left = len(self.runs) - len(self.shown)
        return f"and {left:,} more" if left else ""


def failures(material: Material) -> list[Failure]:
    """Failed runs, those with the same error together, the most frequent first.

    Args:
        material: of the report.
    """
    runs = material.results.runs
    failed = runs[runs["status"] == "failed"]
    groups = [own for _, own in failed.groupby("error", sort=False)]
    return [_failure(own, material) for own in sorted(groups, key=len, reverse=True)[:_MOST_FAILURES]]


def _failure(runs: pd.DataFrame, material: Material) -> Failure:
    rows = runs.to_dict("records")
    traceback = material.results.tracebacks.get(rows[0]["run"], "")
    named = tuple(f"{row['cell']}, {row['role']}, seed {row['seed']} ({row['run']})" for row in rows)
    return Failure(rows[0]["error"], named, traceback[-_LONGEST:])


def _by_cell(material: Material) -> dict[str, Row]:
    return {row["cell"]: row for row in material.effects.to_dict("records") if row["cell"]}


def _against(row: Row | None, percent: bool) -> tuple[str, float]:
    if row is None or not row["n"]:
        return "", math.nan
    return f"{texts.difference_of(row, percent)}{'*' if row['star'] else ''}", row["difference"]


def _over_examples(row: Row, percent: bool) -> str:
    return texts.bounds(row["example_low"], row["example_high"], percent, signed=True)


def _verdict(row: Row) -> str:
    return "significant *" if row["star"] else texts.verdict(row) or ("not significant" if row["n"] else "no pairs")


def _note(row: Row) -> str:
    """What there is to say beside the verdict, which says already that n is too small."""
    return str(row["note"]).removesuffix(too_small(row["m"], row["n"]) or "").removesuffix("; ")


def _quantities(rows: Iterable[Row], name: str) -> Iterable[tuple[str, float]]:
    return ((texts.quantity(row[name]), row[name]) for row in rows)


def _mebibytes(value: float) -> str:
    return texts.amount(value / 2**20, percent=False)


def _metric(name: str, rows: Sequence[Row], material: Material) -> Column:
    percent = material.results.percent and name.rpartition("/")[2] == material.results.metric
    shown = f"{name} in %" if percent else name
    return _numbers(shown, ((texts.amount(row[name], percent), row[name]) for row in rows))


def _words(name: str, values: Iterable[str], filtered: bool = False, kind: str = "") -> Column:
    return Column(name, [Entry(value, None if value == "" else value, kind) for value in values], filtered)


def _numbers(name: str, values: Iterable[tuple[str, float]]) -> Column:
    return Column(name, [Entry("" if text == texts.NONE else text, _key(key), kind="number") for text, key in values])


def _mixed(name: str, values: Iterable[Any]) -> Column:
    """An option: numbers sort as such."""
    entries = [
        Entry(f"{value:g}" if isinstance(value, float) else str(value), _key(value), kind="number")
        if value is not None and value == value
        else Entry("", None)
        for value in values
    ]
    return Column(name, entries)


def _key(value: Any) -> float | str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return value if math.isfinite(value) else None


def _telling(columns: Iterable[Column]) -> list[Column]:
    """Columns without those that say nothing in any row."""
    return [column for column in columns if any(entry.text for entry in column.entries)]
