"""From runs to cells: the choice of a learning rate, means, t intervals and paired differences."""

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import stats

from adapterzoo.ablation.cells import BARE


def t_interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of Student's t interval, with n − 1 degrees of freedom; below two values it has no width."""
    sample = np.asarray(list(values), dtype=float)
    n = len(sample)
    if n < 2:
        return (float(sample.mean()) if n else math.nan), math.nan
    half = stats.t.ppf((1 + level) / 2, n - 1) * sample.std(ddof=1) / math.sqrt(n)
    return float(sample.mean()), float(half)


def best_rates(results: pd.DataFrame) -> dict[str, float]:
    """The learning rate of every cell: best validation accuracy of the tuning runs, ties by lower validation loss."""
    tuned = results[results["role"] == "tune"]
    ranked = tuned.sort_values(["val_accuracy", "val_loss"], ascending=[False, True], kind="stable")
    best = ranked.drop_duplicates("cell")
    return dict(zip(best["cell"], best["lr"], strict=True))


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """One row a cell, from the reported runs alone.

    Args:
        results: one row a run, as in results.csv.

    Returns:
        For every cell: the learning rate, at which edge of the tried ones it lies ("min", "max" or ""), how many seeds,
        test accuracy (mean and half-width of the t interval), its difference to the bare generator, paired by seed
        (likewise), trainable parameters, and the median of the milliseconds per step.
    """
    reported = results[results["role"] == "report"]
    return pd.DataFrame([_row(results, reported, runs) for _, runs in reported.groupby("cell", sort=False)])


def _row(results: pd.DataFrame, reported: pd.DataFrame, runs: pd.DataFrame) -> dict[str, object]:
    first = runs.iloc[0]
    mean, half = t_interval(runs["test_accuracy"])
    gain, gain_half = t_interval(_gains(reported, runs))
    return {
        **{name: first[name] for name in ("cell", "generator", "wrapper", "spec", "lr")},
        "lr_edge": _edge(results, first["cell"], first["lr"]),
        "seeds": len(runs),
        "test_accuracy": mean,
        "test_accuracy_half_width": half,
        "gain_over_bare": gain,
        "gain_half_width": gain_half,
        "adapter_parameters": first["adapter_parameters"],
        "head_parameters": first["head_parameters"],
        "ms_per_step": runs["ms_per_step"].median(),
    }


def _gains(reported: pd.DataFrame, runs: pd.DataFrame) -> pd.Series:
    """Test accuracy less that of the bare generator, for every seed that both have; none for a bare generator."""
    first = runs.iloc[0]
    same = (reported["generator"] == first["generator"]) & (reported["wrapper"] == BARE)
    bare = reported[same & (first["wrapper"] != BARE)]
    return (runs.set_index("seed")["test_accuracy"] - bare.set_index("seed")["test_accuracy"]).dropna()


def _edge(results: pd.DataFrame, cell: str, lr: float) -> str:
    tried = results.loc[(results["role"] == "tune") & (results["cell"] == cell), "lr"]
    if lr == tried.min():
        return "min"
    return "max" if lr == tried.max() else ""
