"""Cells: the mean of each over its seeds, what it costs, and how many of its runs ended."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from adapterzoo.ablation.reports.results import Results
from adapterzoo.ablation.reports.statistics import Values, interval
from adapterzoo.errors import RunsError, did_you_mean

_COLUMNS = (
    "edge", "planned", "done", "failed", "missing", "metric", "n", "seeds", "mean", "low", "high", "method", "sd",
    "note", "adapter_parameters", "head_parameters", "ms_per_step", "memory_bytes", "seconds",
)  # fmt: skip
_LESS = re.compile(r"(loss|seconds|ms_per_step|memory_bytes|parameters|perplexity|error)$")


def cells(results: Results, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """One row a cell and metric, from the report runs.

    Args:
        results: of a folder of runs.
        metrics: columns of `results.runs`; the grid's own metric on the test part if None ("test/accuracy").

    Returns:
        Columns: cell, generator, wrapper, spec, reference, panel, axis/<name>..., option/<name>... (the chosen ones),
        edge ("lr lowest", "lr highest" of at least three tried, or ""), planned, done, failed, missing (numbers of
        runs), metric, n, seeds (list of int, those with a finite value), mean, low, high, method ("t", "BCa", "equal",
        ""), sd, note, and of the runs that are done: adapter_parameters, head_parameters, ms_per_step (medians),
        memory_bytes (largest), seconds (sum).

    Raises:
        RunsError: no run has a metric that was asked for.
    """
    runs = results.runs[results.runs["role"] == "report"]
    named = [name for name in runs if name.startswith(("axis/", "option/"))]
    first = ["cell", "generator", "wrapper", "spec", "reference", "panel", *named]
    groups = [own for _, own in runs.groupby("cell", sort=False)]
    rows = [_cell(own, first, metric) for metric in chosen(results, metrics) for own in groups]
    table = pd.DataFrame(rows, columns=[*first, *_COLUMNS])
    for name in named:  # as the grid has them: 2 stays 2 though another cell has no rank
        table[name] = pd.Series([row[name] for row in rows], index=table.index, dtype=runs[name].dtype)
    return table


def chosen(results: Results, metrics: Sequence[str] | None) -> tuple[str, ...]:
    """The metrics that were asked for, or the grid's own on the test part.

    Raises:
        RunsError: no run has one of them; all are named, and those that there are.
    """
    known = results.metrics
    unknown = [name for name in metrics or () if name not in known]
    if unknown:
        raise RunsError(
            f"no run in {str(results.folder)!r} has {', '.join(map(repr, unknown))}; its metrics are "
            f"{', '.join(known) or 'none'}{did_you_mean(unknown[0], known)}"
        )
    return (results.column,) if metrics is None else tuple(metrics)


def direction(results: Results, metric: str) -> bool | None:
    """Whether more of a metric is better; None where nothing says so.

    Args:
        results: which knows its own metric.
        metric: a column of `results.runs`.
    """
    if metric.rpartition("/")[2] == results.metric:
        return results.maximise
    return False if _LESS.search(metric) else None


def _cell(runs: pd.DataFrame, first: Sequence[str], metric: str) -> dict[str, Any]:
    done = runs[runs["status"] == "done"].sort_values("seed")
    kept = done[np.isfinite(_column(done, metric))]
    values = _column(kept, metric)
    found = interval(values)
    return {
        **{name: runs.iloc[0][name] for name in (*first, "edge")},
        "planned": len(runs),
        **{status: int((runs["status"] == status).sum()) for status in ("done", "failed", "missing")},
        "metric": metric,
        "n": len(values),
        "seeds": kept["seed"].tolist(),
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "method": found.method,
        "sd": float(values.std(ddof=1)) if len(values) > 1 else math.nan,
        "note": _note(runs, len(done), len(values), metric),
        **_costs(done),
    }


def _costs(done: pd.DataFrame) -> dict[str, float]:
    medians = ("adapter_parameters", "head_parameters", "ms_per_step")
    return {
        **{name: _summary(done, name, np.median) for name in medians},
        "memory_bytes": _summary(done, "memory_bytes", np.max),
        "seconds": _summary(done, "seconds", np.sum),
    }


def _note(runs: pd.DataFrame, done: int, finite: int, metric: str) -> str:
    counts = {status: int((runs["status"] == status).sum()) for status in ("failed", "missing")}
    notes = [f"{number} of {len(runs)} {status}" for status, number in counts.items() if number]
    notes += [f"{done - finite} without a finite {metric}"] if finite < done else []
    notes += ["one run has no interval"] if finite == 1 else []
    return "; ".join(notes)


def _column(runs: pd.DataFrame, name: str) -> Values:
    return np.asarray(runs[name] if name in runs else [math.nan] * len(runs), dtype=float)


def _summary(runs: pd.DataFrame, name: str, how: Callable[[Values], Any]) -> float:
    values = _column(runs, name)
    values = values[np.isfinite(values)]
    return float(how(values)) if len(values) else math.nan
