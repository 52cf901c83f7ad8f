"""Numbers as a reader meets them, in the terminal and in LaTeX: shares in per cent, differences of them in points."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

NONE = "-"


def amount(value: float, percent: bool, signed: bool = False) -> str:
    """A value of the metric: 85.3 of a share, four digits of anything else; "-" if there is none.

    Example:
        >>> amount(0.8531, percent=True), amount(-0.0, percent=True, signed=True), amount(1.23456, percent=False)
        ('85.3', '+0.0', '1.235')
    """
    if not math.isfinite(value):
        return NONE
    sign = "+" if signed else ""
    return f"{100 * value:{sign}z.1f}" if percent else f"{value + 0.0:{sign}.4g}"


def estimate(value: float, low: float, high: float, percent: bool, signed: bool = False) -> str:
    """A value with its interval: 85.3 [82.1, 88.5]; the value alone where there is no interval.

    Example:
        >>> estimate(0.012, -0.003, 0.027, percent=True, signed=True)
        '+1.2 [-0.3, +2.7]'
    """
    shown = amount(value, percent, signed)
    return f"{shown} {bounds(low, high, percent, signed)}" if math.isfinite(low) and math.isfinite(high) else shown


def bounds(low: float, high: float, percent: bool, signed: bool = False) -> str:
    """An interval alone; "-" if there is none."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return NONE
    return f"[{amount(low, percent, signed)}, {amount(high, percent, signed)}]"


def mean_of(row: Mapping[str, Any], percent: bool) -> str:
    """What a row of `cells` says of its mean; runs that are all equal are said to be.

    Args:
        row: of the table.
        percent: whether the metric is a share.
    """
    if row["method"] == "equal":
        return f"all {row['n']} equal: {amount(row['mean'], percent)}"
    return estimate(row["mean"], row["low"], row["high"], percent)


def difference_of(row: Mapping[str, Any], percent: bool) -> str:
    """What a row of `effects` says of its difference: all 8 equal: +0.0, where the pairs do not vary.

    Args:
        row: of the table.
        percent: whether the metric is a share.
    """
    if row["method"] == "equal":
        return f"all {row['n']} equal: {amount(row['difference'], percent, signed=True)}"
    return estimate(row["difference"], row["low"], row["high"], percent, signed=True)


def probability(p: float) -> str:
    """A p: 0.031, <0.001 below that, "-" if there is none."""
    if not math.isfinite(p):
        return NONE
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def verdict(row: Mapping[str, Any]) -> str:
    """A star, or why there is none where there can be none."""
    if row["star"]:
        return "*"
    if row["m"] == 0:
        return "no bare cell"
    return f"n too small: {row['needed']} needed" if row["too_small"] else ""


def effect(d_z: float) -> str:
    """Cohen's d_z: +0.78."""
    return f"{d_z:+z.2f}" if math.isfinite(d_z) else NONE


def quantity(value: float) -> str:
    """A count, such as of parameters: 12,288."""
    return f"{value:,.0f}" if math.isfinite(value) else NONE


def options_of(row: Mapping[str, Any]) -> str:
    """The options that were chosen for a cell, and which of them lie at an end of those tried."""
    found = {name.removeprefix("option/"): value for name, value in row.items() if name.startswith("option/")}
    ends = dict(part.split(" ", 1) for part in row["edge"].split(", ") if part)
    return ", ".join(
        f"{name} {f'{value:g}' if isinstance(value, float) else value}{f' ({ends[name]})' if name in ends else ''}"
        for name, value in found.items()
        if not pd.isna(value)
    )
