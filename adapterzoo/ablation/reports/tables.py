"""Tables in the terminal, and what they can and can't show."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from adapterzoo.ablation.reports import texts
from adapterzoo.ablation.reports.cells import cells
from adapterzoo.ablation.reports.effects import effects
from adapterzoo.ablation.reports.results import Results
from adapterzoo.errors import count

_WIDTH = 160
_LEFT = {"generator", "wrapper", "panel", "options", "note", "cell", "error"}
Column = tuple[str, list[str]]


def terminal(results: Results, console: Console | None = None) -> None:
    """Print a report: the cells, the effects of wrappers, what failed, and how to read it.

    Args:
        results: of a folder of runs.
        console: where to; the terminal if None.
    """
    console = console or Console()
    if not console.is_terminal:  # a file or a pipe has no width, and a wrapped table is hard to read there
        console.width = max(console.width, _WIDTH)
    found = effects(results)
    console.print(cell_table(cells(results), results))
    for family in ("primary", "secondary"):
        part = found[found["family"] == family]
        if len(part):
            console.print(effect_table(part, results))
    failed = results.runs[results.runs["status"] == "failed"]
    if len(failed):
        console.print(failed_table(failed))
    for line in (*summary(results), *notes(found)):
        console.print(Text(line))


def cell_table(table: pd.DataFrame, results: Results) -> Group:
    """The cells as a table.

    Args:
        table: from `cells`.
        results: that it was made from.
    """
    unit = " in %" if results.percent else ""
    return _table(cell_columns(table, results), f"{results.column}{unit}: mean [95 % interval over seeds]")


def cell_columns(table: pd.DataFrame, results: Results) -> list[Column]:
    """The columns of the cells' table as text.

    Args:
        table: from `cells`.
        results: that it was made from.
    """
    rows = table.to_dict("records")
    return _shown(
        [
            ("generator", [row["generator"] for row in rows]),
            ("wrapper", [row["wrapper"] for row in rows]),
            ("panel", [row["panel"] for row in rows]),
            ("options", [texts.options_of(row) for row in rows]),
            (results.metric, [texts.mean_of(row, results.percent) for row in rows]),
            ("n", [str(row["n"]) for row in rows]),
            ("parameters", [texts.quantity(row["adapter_parameters"]) for row in rows]),
            ("head", [texts.quantity(row["head_parameters"]) for row in rows]),
            ("ms/step", [texts.amount(row["ms_per_step"], percent=False) for row in rows]),
            ("note", [row["note"] for row in rows]),
        ]
    )


def effect_table(table: pd.DataFrame, results: Results) -> Group:
    """One family of effects as a table.

    Args:
        table: rows of `effects`, of one family.
        results: that it was made from.
    """
    return _table(effect_columns(table, results), effect_title(table, results))


def effect_title(table: pd.DataFrame, results: Results) -> str:
    """What a table of effects shows."""
    unit = " in points" if results.percent else ""
    what = "averaged over generators and panels" if table["family"].iloc[0] == "primary" else "cell by cell"
    return f"{results.column}{unit}, wrapper less bare, paired by seed, {what}"


def effect_columns(table: pd.DataFrame, results: Results) -> list[Column]:
    """The columns of a table of effects as text.

    Args:
        table: rows of `effects`, of one family.
        results: that it was made from.
    """
    rows, percent = table.to_dict("records"), results.percent
    over = [texts.bounds(row["example_low"], row["example_high"], percent, signed=True) for row in rows]
    return _shown(
        [
            ("wrapper", [row["wrapper"] for row in rows]),
            ("generator", [row["generator"] for row in rows]),
            ("panel", [row["panel"] for row in rows]),
            ("n", [str(row["n"]) for row in rows]),
            ("difference [over seeds]", [texts.difference_of(row, percent) for row in rows]),
            ("[over examples]", over if any(text != texts.NONE for text in over) else [""] * len(rows)),
            ("d_z", [texts.effect(row["d_z"]) for row in rows]),
            ("p", [texts.probability(row["p"]) for row in rows]),
            (f"p ({table['correction'].iloc[0]})", [texts.probability(row["p_adjusted"]) for row in rows]),
            ("verdict", [texts.verdict(row) for row in rows]),
        ]
    )


def failed_table(runs: pd.DataFrame) -> Group:
    """Runs that failed, with their errors.

    Args:
        runs: rows of `results.runs`.
    """
    names = ("cell", "role", "seed", "error", "run")
    return _table([(name, [str(value) for value in runs[name]]) for name in names], count(len(runs), "failed run"))


def summary(results: Results) -> list[str]:
    """How many runs there are, and what in the folder is not shown."""
    by = results.runs["status"].value_counts()
    lines = [", ".join(f"{by.get(status, 0):,} {status}" for status in ("done", "failed", "missing"))]
    lines += [f"{count(results.others, 'run')} of other grids in the folder, not shown"] if results.others else []
    return lines + [f"damaged: {problem}" for problem in results.problems]


def notes(table: pd.DataFrame) -> list[str]:
    """How to read the effects, and every note that a row has, each once.

    Args:
        table: from `effects`.
    """
    if table.empty:
        return []
    lines = [HOW_TO_READ]
    for note in dict.fromkeys(note for note in table["note"] if note):
        rows = table[table["note"] == note]
        lines.append(f"{_named(rows.to_dict('records'))}: {note}")
    return lines


HOW_TO_READ = (
    "Intervals over seeds say how the difference varies when training is repeated, those over examples how it varies "
    "with the test examples, for these very runs: neither holds the other. p is that of the exact sign-flip test; a "
    "star means that p is at most 0.05 after correction for all tests of its table (Holm for wrappers, "
    "Benjamini-Hochberg for single cells). No interval is corrected. No star does not mean no difference."
)


def _named(rows: Sequence[Mapping[Any, Any]]) -> str:
    names = [row["cell"] or f"{row['wrapper']} (average)" for row in rows]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} others"


def _shown(columns: Iterable[Column]) -> list[Column]:
    """Columns without those that say nothing in any of the rows."""
    return [(name, values) for name, values in columns if any(values) or not values]


def _table(columns: Sequence[Column], title: str) -> Group:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, _ in columns:
        table.add_column(Text(name), justify="left" if name in _LEFT else "right", overflow="fold")
    for row in zip(*(values for _, values in columns), strict=True):
        table.add_row(*map(Text, row))  # no markup: a name may hold brackets
    return Group(Text(title, style="bold"), table)
