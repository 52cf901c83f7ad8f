"""Pareto fronts: every cell by what it costs and what it reaches."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from adapterzoo.ablation.reports import texts
from adapterzoo.ablation.reports.pictures.material import Material
from adapterzoo.ablation.reports.pictures.picture import Picture
from adapterzoo.ablation.reports.pictures.style import (
    GREY,
    INK,
    SMALL,
    Look,
    below,
    beside,
    handle,
    headline,
    in_style,
    looks,
    markers,
    plain_ticks,
    short,
    slug,
)  # fmt: skip

_COSTS = {
    "adapter_parameters": ("parameters of adapters", 1.0),
    "ms_per_step": ("milliseconds a step", 1.0),
    "memory_bytes": ("memory in MiB", 2.0**-20),
}
_LOGARITHMIC = 20  # from this ratio of largest and smallest on
_REFERENCE = "*"
Row = Mapping[Any, Any]


def front_pictures(material: Material) -> Iterator[Picture]:
    """A picture for each cost and problem that has cells with both numbers.

    Args:
        material: of the report.
    """
    for (problem, cost), own in material.fronts.groupby(["problem", "cost"], sort=False):
        known = own[own["mean"].notna() & own["cost_value"].notna()]
        if len(known) > 1:
            yield _front(material, known, str(problem), str(cost))


@in_style
def _front(material: Material, table: pd.DataFrame, problem: str, cost: str) -> Picture:
    name, unit = _COSTS[cost]
    table = table.assign(x=unit * table["cost_value"], y=(100 if material.results.percent else 1) * table["mean"])
    first = table[table["front"].astype(bool)].sort_values("x")
    figure = Figure(figsize=(7.4, 4.4), layout="constrained")
    axes = figure.subplots()
    _scale(axes, table["x"])
    axes.step(first["x"], first["y"], where="post", color=GREY, linewidth=1, zorder=1)
    look, marks = looks(material.wrappers, material.results.reference), markers(material.generators)
    for row in table.to_dict("records"):
        _point(axes, row, look, marks)
    _number(axes, first.to_dict("records"), material.results.percent)
    metric = f"{material.results.column}{' in %' if material.results.percent else ''}"
    axes.set(xlabel=f"{name}, less is better", ylabel=metric)
    axes.grid()
    below(figure, _legend(table, look, marks))
    title = f"{metric} against {name}" + (f", {problem}" if problem else "")
    headline(figure, title)
    return Picture(slug("front", cost, problem), "fronts", "", title, _alt(first, title), figure)


def _scale(axes: Axes, costs: pd.Series) -> None:
    positive = costs[costs > 0]
    if len(positive) and positive.max() / positive.min() >= _LOGARITHMIC:
        if (costs == 0).any():  # the head alone has no adapters: zero stands to the left of the smallest
            axes.set_xscale("symlog", linthresh=positive.min(), linscale=0.3)
            decades = 10.0 ** np.arange(np.ceil(np.log10(positive.min())), np.floor(np.log10(positive.max())) + 1)
            axes.set_xticks([0, *decades])
            axes.minorticks_off()
        else:
            axes.set_xscale("log")
    plain_ticks(axes)


def _point(axes: Axes, row: Row, look: Mapping[str, Look], marks: Mapping[str, str]) -> None:
    colour, mark = (GREY, _REFERENCE) if row["reference"] else (look[row["wrapper"]].colour, marks[row["generator"]])
    faded = 1.0 if row["front"] else 0.45
    axes.plot([row["x"]], [row["y"]], mark, color=colour, markersize=7, alpha=faded, zorder=3 if row["front"] else 2)


def _number(axes: Axes, rows: list[Row], percent: bool) -> None:
    """Number the points of the front, and say at the side which they are: names beside points would overlap."""
    lines = ["no cell beats these in both:"]
    for number, row in enumerate(rows, 1):
        axes.annotate(
            str(number),
            (row["x"], row["y"]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=SMALL,
            color=INK,
        )
        lines.append(f"{number} {short(row['cell'], 34)}: {texts.amount(row['mean'], percent)}")
    beside(axes, 1.0, "\n".join(lines), "axes fraction", va="top", fontsize=SMALL, linespacing=1.5)


def _legend(table: pd.DataFrame, look: Mapping[str, Look], marks: Mapping[str, str]) -> list[tuple[str, Line2D]]:
    own = table[~table["reference"].astype(bool)]
    wrappers, generators = set(own["wrapper"]), set(own["generator"])
    entries = [(name, _dot(style.colour, "o")) for name, style in look.items() if name in wrappers]
    entries += [(name, _dot(GREY, mark)) for name, mark in marks.items() if name in generators]
    if table["reference"].astype(bool).any():
        entries.append(("reference", _dot(GREY, _REFERENCE)))
    return entries


def _dot(colour: str, mark: str) -> Line2D:
    return handle(colour, marker=mark, linestyle="", markersize=6)


def _alt(first: pd.DataFrame, title: str) -> str:
    return f"Scatter plot. {title}: no cell beats {', '.join(first['cell'])} in both."
