"""The tables of the page: what stands in each, and what it is sorted by."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from adapterzoo.ablation.reports import texts
from adapterzoo.ablation.reports.page.table import Column, Table, mixed, numbers, telling, words
from adapterzoo.ablation.reports.pictures.material import Material
from adapterzoo.ablation.reports.statistics import too_small
from adapterzoo.ablation.reports.tables import effect_title
from adapterzoo.errors import count

MOST_RUNS = 2_000
_UNFINISHED_FIRST = {"failed": 0, "missing": 1, "done": 2}
Row = Mapping[Any, Any]


def cells_table(material: Material) -> Table:
    """Every cell: what it reached, what it costs, how many of its runs ended.

    Args:
        material: of the report.
    """
    rows: list[Row] = material.cells.to_dict("records")
    percent, effects = material.results.percent, _by_cell(material)
    columns = [
        words("cell", (row["cell"] for row in rows)),
        words("generator", (row["generator"] for row in rows), filtered=True),
        words("wrapper", (row["wrapper"] for row in rows), filtered=True),
        words("panel", (row["panel"] for row in rows), filtered=True),
        numbers(material.results.column, ((texts.mean_of(row, percent), row["mean"]) for row in rows)),
        numbers("against bare", (_against(effects.get(row["cell"]), percent) for row in rows)),
        numbers("n", ((str(row["n"]), row["n"]) for row in rows)),
        words("chosen", (texts.options_of(row) for row in rows), kind="tight"),
        numbers("parameters", _quantities(rows, "adapter_parameters")),
        numbers("head", _quantities(rows, "head_parameters")),
        numbers("ms a step", ((texts.amount(row["ms_per_step"], False), row["ms_per_step"]) for row in rows)),
        numbers("MiB", ((_mebibytes(row["memory_bytes"]), row["memory_bytes"]) for row in rows)),
        words("note", (row["note"] for row in rows), kind="wide"),
    ]
    unit = " in %" if percent else ""
    said = f"{count(len(rows), 'cell')}: {material.results.column}{unit}, mean and 95 % interval over seeds"
    return Table("cells", said, telling(columns))


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
        words("wrapper", (row["wrapper"] for row in rows), filtered=family == "secondary"),
        words("generator", (row["generator"] for row in rows), filtered=True),
        words("panel", (row["panel"] for row in rows), filtered=True),
        numbers("n", ((str(row["n"]), row["n"]) for row in rows)),
        numbers("difference [over seeds]", ((texts.difference_of(row, percent), row["difference"]) for row in rows)),
        numbers("[over examples]", ((_over_examples(row, percent), row["example_low"]) for row in rows)),
        numbers("d_z", ((texts.effect(row["d_z"]), row["d_z"]) for row in rows)),
        numbers("p", ((texts.probability(row["p"]), row["p"]) for row in rows)),
        numbers(f"p ({correction})", ((texts.probability(row["p_adjusted"]), row["p_adjusted"]) for row in rows)),
        words("verdict", (_verdict(row) for row in rows), kind="tight"),
        words("note", (_note(row) for row in rows), kind="wide"),
    ]
    return Table(f"effects-{family}", effect_title(table, material.results), telling(columns))


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
        words("run", (row["run"] for row in rows)),
        words("cell", (row["cell"] for row in rows)),
        words("generator", (row["generator"] for row in rows), filtered=True),
        words("wrapper", (row["wrapper"] for row in rows), filtered=True),
        words("panel", (row["panel"] for row in rows), filtered=True),
        words("role", (row["role"] for row in rows), filtered=True),
        words("status", (row["status"] for row in rows), filtered=True),
        numbers("seed", ((str(row["seed"]), row["seed"]) for row in rows)),
        *(mixed(str(name).removeprefix("option/"), (row[name] for row in rows)) for name in options),
        *(_metric(name, rows, material) for name in metrics),
        numbers("seconds", ((texts.amount(row["seconds"], False), row["seconds"]) for row in rows)),
        words("error", (row["error"] for row in rows), kind="wide"),
    ]
    said = f"{count(len(every), 'run')}"
    if len(shown) < len(every):
        said = f"{len(shown):,} of {said}, those that failed or are missing first; runs.csv has all"
    return Table("runs", said, telling(columns))


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
    return numbers(shown, ((texts.amount(row[name], percent), row[name]) for row in rows))
