"""The effect of each wrapper: differences from the bare generator, paired by seed."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from adapterzoo.ablation.reports.by_example import Examples
from adapterzoo.ablation.reports.cells import cells as cells
from adapterzoo.ablation.reports.cells import chosen, direction
from adapterzoo.ablation.reports.fronts import fronts as fronts
from adapterzoo.ablation.reports.pairs import Pairs, by_cell, by_wrapper, reported
from adapterzoo.ablation.reports.results import Results
from adapterzoo.ablation.reports.statistics import (
    ALPHA,
    all_equal,
    benjamini_hochberg,
    effect_size,
    holm,
    interval,
    needed_pairs,
    sign_flip,
    too_small,
)

_COLUMNS = (
    "metric", "family", "wrapper", "generator", "panel", "cell", "cells", "n", "seeds", "difference", "low", "high",
    "method", "p", "p_adjusted", "correction", "m", "needed", "too_small", "star", "better", "note", "example_low",
    "example_high", "example_n", "d_z",
)  # fmt: skip
_UNTESTED = {"p_adjusted": math.nan, "m": 0, "needed": 0, "too_small": True, "star": False}


def effects(results: Results, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """One row a comparison of a wrapper with its bare generator, paired by seed.

    Args:
        results: of a folder of runs.
        metrics: columns of `results.runs`; the grid's own metric on the test part if None. Every metric is corrected by
            itself; metrics other than the grid's own have no primary family.

    Returns:
        Columns: metric, family ("primary": a wrapper, each seed's difference averaged over generators and panels;
        "secondary": one cell), wrapper, generator, panel, cell ("" where averaged), cells (how many are averaged), n,
        seeds (list of int), difference (wrapper less bare; NaN without pairs), low, high, method ("t", "BCa", "equal",
        ""), p (exact sign-flip), p_adjusted, correction ("Holm", "BH"), m (tests corrected together: all that the grid
        makes possible), needed (pairs that m tests need), too_small (bool), star (bool: p_adjusted <= 0.05 and not
        too_small), better (True, False, or None where no direction is known or nothing differs), note (sentences, by
        "; "), example_low, example_high, example_n (over examples instead of seeds), d_z.

    Raises:
        RunsError: no run has a metric that was asked for.
    """
    rows = [row for metric in chosen(results, metrics) for row in _effects(results, metric)]
    return pd.DataFrame(rows, columns=list(_COLUMNS)).astype({"better": object})


def _effects(results: Results, metric: str) -> list[dict[str, Any]]:
    runs = reported(results, metric)
    single = by_cell(results, runs)
    mean = by_wrapper(single)
    own = metric == results.column
    families = [("primary", mean), ("secondary", single)] if own else [("secondary", [*mean, *single])]
    examples, more = Examples(results, runs), direction(results, metric)
    return [
        {"metric": metric, "family": family, **row}
        for family, members in families
        for row in _corrected([_effect(pairs, examples, more) for pairs in members], members, family)
    ]


def _corrected(rows: list[dict[str, Any]], members: Sequence[Pairs], family: str) -> list[dict[str, Any]]:
    """Correct the tests of a family together: all that the grid makes possible, even where no run has ended."""
    correct, name = (holm, "Holm") if family == "primary" else (benjamini_hochberg, "BH")
    tests = [row for row, pairs in zip(rows, members, strict=True) if pairs.possible]
    m = len(tests)
    for row, adjusted in zip(tests, correct(row["p"] for row in tests), strict=True):
        small = too_small(m, row["n"]) or ""
        row |= {"p_adjusted": float(adjusted), "m": m, "needed": needed_pairs(m), "too_small": bool(small)}
        row["star"] = bool(adjusted <= ALPHA and not small)
        row["note"] = "; ".join(filter(None, [row["note"], small]))
    return [{**row, "correction": name} for row in rows]


def _effect(pairs: Pairs, examples: Examples, more: bool | None) -> dict[str, Any]:
    found = interval(pairs.differences, pairs.scale)
    over, size, why = examples.interval(pairs)
    return {
        **{name: getattr(pairs, name) for name in ("wrapper", "generator", "panel", "cell")},
        "cells": len(pairs.cells),
        "n": len(pairs.seeds),
        "seeds": list(pairs.seeds),
        "difference": found.mean,
        "low": found.low,
        "high": found.high,
        "method": found.method,
        "p": sign_flip(pairs.differences, pairs.scale),
        **_UNTESTED,
        "better": _better(pairs, found.mean, more),
        "note": "; ".join([*_notes(pairs, found.method), *([why] if why else [])]),
        "example_low": over.low,
        "example_high": over.high,
        "example_n": size,
        "d_z": effect_size(pairs.differences, pairs.scale),
    }


def _better(pairs: Pairs, difference: float, more: bool | None) -> bool | None:
    """None where nothing differs: the mean is as near to zero as equal values are to each other."""
    if more is None or not pairs.seeds or all_equal([difference, 0.0], pairs.scale):
        return None
    return (difference > 0) == more


def _notes(pairs: Pairs, method: str) -> list[str]:
    n = len(pairs.seeds)
    notes = [f"all {n} differences are equal"] if method == "equal" else []
    notes += [f"{n} of {n + len(pairs.lost)} pairs: {_grouped(pairs)}"] if pairs.lost else []
    notes += [f"left out: {', '.join(pairs.left_out)}"] if pairs.left_out else []
    notes += ["one pair has no interval"] if n == 1 else []
    notes += ["no d_z below 3 pairs"] if 0 < n < 3 else []
    return notes + (["no d_z: the differences do not vary"] if n >= 3 and method == "equal" else [])


def _grouped(pairs: Pairs) -> str:
    """Seeds that are no pairs, those with the same reason together."""
    reasons: dict[str, list[int]] = {}
    for seed, why in pairs.lost.items():
        reasons.setdefault(why, []).append(seed)
    return ", ".join(
        f"{'seed' if len(seeds) == 1 else 'seeds'} {' '.join(map(str, seeds))} ({why})"
        for why, seeds in reasons.items()
    )
