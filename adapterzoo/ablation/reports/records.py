"""The files of a folder of runs, one by one, each read as it stands: what is damaged is said, never guessed."""

import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from adapterzoo.ablation.grids.planned import CellRecord
from adapterzoo.ablation.runs.folder import GRID, read_grid, records_of
from adapterzoo.ablation.runs.store import ENVIRONMENT, EXAMPLES, METRICS, Store
from adapterzoo.errors import RunsError, did_you_mean

# What numpy raises for no file, and for damaged ones.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)
_ABOUT = ("grid", "metric", "maximise", "percent", "tuned")


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Args:
        status: "done", "failed" or "missing".
        metrics: numbers by name.
        seconds: that it took.
        error: its error in one line.
        traceback: of it.
        problem: why its record can't be read, "" if it can.
    """

    status: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = math.nan
    error: str = ""
    traceback: str = ""
    problem: str = ""


def grid(folder: Path) -> tuple[dict[str, Any], list[CellRecord]]:
    """What grid.json says, and the cells in it.

    Raises:
        RunsError: there is none, or none that this version can read.
    """
    if not folder.is_dir():
        near = [path.name for path in folder.parent.glob("*") if path.is_dir()] if folder.parent.is_dir() else []
        raise RunsError(f"there is no folder {str(folder)!r}{did_you_mean(folder.name, near)}")
    content = read_grid(folder)
    missing = [name for name in _ABOUT if name not in content]
    if missing:
        raise RunsError(f"{folder / GRID} is no record of a grid: it lacks {', '.join(missing)}")
    try:
        return content, records_of(content)
    except (KeyError, TypeError) as error:
        raise RunsError(f"{folder / GRID} is no record of a grid: {error}") from None


def ended(store: Store, run: str) -> Ended:
    """How a run ended; missing if it has not."""
    try:
        content = store.result(run)
        return Ended("missing") if content is None else _ended(content)
    except (RunsError, ValueError, KeyError, TypeError, AttributeError) as error:
        kind = "" if isinstance(error, RunsError) else f"the record of run {run} is damaged: {type(error).__name__}: "
        return Ended("failed", error=_line(f"{kind}{error}"), traceback=f"{kind}{error}", problem=f"{kind}{error}")


def _ended(content: Mapping[str, Any]) -> Ended:
    metrics = {str(name): _number(value) for name, value in (content["metrics"] or {}).items()}
    seconds = _number(content.get("seconds"))
    if content["status"] == "done":
        return Ended("done", metrics, seconds)
    error = content["error"]
    line = _line(f"{error['type']}: {error['message']}".removeprefix(": "))
    return Ended("failed", metrics, seconds, line, str(error["traceback"]) or line)


def _number(value: Any) -> float:
    """JSON has no NaN; null stands for it."""
    return math.nan if value is None else float(value)


def _line(text: str) -> str:
    return " ".join(text.split())


def environment(path: Path, run: str) -> dict[str, Any]:
    """The environment record of a run; the name alone where there is none that can be read."""
    try:
        content = json.loads((path / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    return {"run": run, **(content if isinstance(content, dict) else {})}


def curve(path: Path, run: str) -> list[tuple[str, int, str, float]]:
    """The lines of metrics.jsonl as (run, step, name, value); what is no number, and half a line, is left out."""
    try:
        lines = (path / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    points = [point for point in map(_point, lines) if isinstance(point.get("step"), int)]
    return [
        (run, point["step"], name, _number(value))
        for point in points
        for name, value in point.items()
        if name != "step" and (value is None or isinstance(value, int | float))
    ]


def _point(line: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def examples(path: Path) -> pd.DataFrame:
    """The columns of examples.npz that are one entry an example; no rows where there are none, or no usable score."""
    nothing = pd.DataFrame({"id": [], "score": []})
    try:
        with (path / EXAMPLES).open("rb") as file, np.load(file, allow_pickle=False) as stored:
            columns = {name: stored[name] for name in stored.files}
    except _UNREADABLE:
        return nothing
    score = columns.get("score", np.empty(0, dtype=str))
    flat = {name: values for name, values in columns.items() if values.shape == score.shape and values.ndim == 1}
    return pd.DataFrame(flat) if score.dtype.kind in "biuf" and {"id", "score"} <= set(flat) else nothing
