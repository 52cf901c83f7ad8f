"""A report as files: tables to compute with and to print, all of them or none."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pandas as pd

from adapterzoo.ablation.reports.cells import cells
from adapterzoo.ablation.reports.effects import effects
from adapterzoo.ablation.reports.fronts import fronts
from adapterzoo.ablation.reports.latex import cells_latex, effects_latex
from adapterzoo.ablation.reports.results import Results
from adapterzoo.errors import RunsError

FORMAT = 1


def write_all(results: Results, out: Path | str) -> list[Path]:
    """Write every table of a report: CSV and Parquet of runs, cells, effects and fronts, LaTeX of cells and effects, \
the curves and environments, and all of it but the curves as JSON.

    Args:
        results: of a folder of runs.
        out: a folder; made if it is not there. Files of these names in it are replaced, all or none.

    Returns:
        The files.

    Raises:
        RunsError: they can't be written. Nothing was changed.
    """
    with together(Path(out)) as folder:
        write_tables(results, folder)
        names = sorted(path.name for path in folder.iterdir())
    return [Path(out) / name for name in names]


def write_tables(results: Results, folder: Path) -> None:
    """Write the tables into a folder that is there, as they come.

    Args:
        results: of a folder of runs.
        folder: such as `together` gives.
    """
    found = {"runs": results.runs, "cells": cells(results), "effects": effects(results), "fronts": fronts(results)}
    for name, table in found.items():
        flat(table).to_csv(folder / f"{name}.csv", index=False)
        typed(table).to_parquet(folder / f"{name}.parquet", index=False)
    typed(results.curves).to_parquet(folder / "curves.parquet", index=False)
    flat(results.environments).to_csv(folder / "environments.csv", index=False)
    (folder / "cells.tex").write_text(cells_latex(found["cells"], results), encoding="utf-8")
    (folder / "effects.tex").write_text(effects_latex(found["effects"], results), encoding="utf-8")
    (folder / "report.json").write_text(as_json(results, found), encoding="utf-8")


def as_json(results: Results, tables: dict[str, pd.DataFrame]) -> str:
    """Tables as JSON: what is not a finite number is null.

    Args:
        results: that they were made from.
        tables: by name; each becomes a list of rows.
    """
    content = {
        "format": FORMAT,
        "grid": results.grid,
        "metric": results.column,
        "maximise": results.maximise,
        "percent": results.percent,
        "others": results.others,
        "problems": list(results.problems),
        **{name: table.to_dict("records") for name, table in tables.items()},
    }
    return json.dumps(_plain(content), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    number = value.item() if hasattr(value, "item") else value
    return None if number is pd.NA or (isinstance(number, float) and not math.isfinite(number)) else number


def flat(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose lists are text, "0 1 2", for formats that hold none."""
    lists = [name for name in table if any(isinstance(value, list) for value in table[name])]
    joined = {
        name: [" ".join(map(str, value)) if isinstance(value, list) else value for value in table[name]]
        for name in lists
    }
    return table.assign(**joined)


def typed(table: pd.DataFrame) -> pd.DataFrame:
    """A table in which every column has one type: values of several kinds become text."""
    mixed = [name for name in table if table[name].dtype == object and len(_kinds(table[name])) > 1]
    return table.assign(**{name: [None if value is None else str(value) for value in table[name]] for name in mixed})


def _kinds(column: pd.Series) -> set[type]:
    return {type(value) for value in column if value is not None}


@contextmanager
def together(out: Path) -> Iterator[Path]:
    """A folder to write files into that appear in `out` when the block ends well, all or none.

    Files of the same names are replaced, others stay. Only a kill in the moment of the renames could leave a mixture.

    Args:
        out: made if it is not there, parents included.

    Raises:
        RunsError: files can't be written. `out` is as it was.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        beside = Path(mkdtemp(prefix=".writing-", dir=out))
        try:
            (beside / "new").mkdir()
            yield beside / "new"
            _move(beside / "new", out, beside / "old")
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except BaseException as error:
        for folder in made:
            _remove_empty(folder)
        if isinstance(error, OSError):
            raise RunsError(
                f"the report can't be written to {str(out)!r}: {error.strerror or error}; nothing was changed. Choose "
                "another folder, or make room"
            ) from None
        raise


def _move(new: Path, out: Path, old: Path) -> None:
    """Put every file under `new` into its place under `out`; if one can't be, put back what was there."""
    placed: list[Path] = []
    try:
        for path in sorted(path for path in new.rglob("*") if path.is_file()):
            name = path.relative_to(new)
            for folder in (out / name, old / name):
                folder.parent.mkdir(parents=True, exist_ok=True)
            if (out / name).exists():
                shutil.copy2(out / name, old / name)  # a copy, so that a reader finds the old file until the new one
            path.replace(out / name)
            placed.append(name)
    except OSError:
        for name in placed:
            if (old / name).exists():
                (old / name).replace(out / name)
            else:
                (out / name).unlink()
        raise


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
