"""Forests: every effect with its intervals, the primary family first, then the single cells of each panel."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
    PAPER,
    SMALL,
    Look,
    below,
    beside,
    handle,
    headline,
    in_style,
    looks,
    short,
    slug,
)

Row = Mapping[Any, Any]


def forests(material: Material) -> Iterator[Picture]:
    """The picture of the primary family, then one a panel of single cells; none where there is no pair.

    Args:
        material: of the report.
    """
    effects = material.effects
    primary = effects[effects["family"] == "primary"]
    if primary["n"].any():
        yield _forest(material, primary, "effects", "")
    secondary = effects[effects["family"] == "secondary"]
    for panel in material.drawn:
        own = secondary[secondary["panel"] == panel]
        if own["n"].any():
            yield _forest(material, own, "single", panel)


@in_style
def _forest(material: Material, table: pd.DataFrame, section: str, panel: str) -> Picture:
    rows, results = table.to_dict("records"), material.results
    figure = Figure(figsize=(7.4, 0.34 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    look = looks(material.wrappers, results.reference)
    for y, row in enumerate(rows):
        _draw(axes, y, row, look[row["wrapper"]], results.percent)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_xlabel(_direction(material))
    below(figure, _legend(rows))
    title = _title(material, section, panel)
    headline(figure, title)
    return Picture(slug("effects" if section == "effects" else "effects_cells", panel), section, panel, title,
                   _alt(rows, title, results.percent), figure)  # fmt: skip


def _draw(axes: Axes, y: int, row: Row, look: Look, percent: bool) -> None:
    factor = 100 if percent else 1
    if math.isfinite(row["example_low"]):
        ends = [factor * row["example_low"], factor * row["example_high"]]
        axes.plot(ends, [y + 0.22] * 2, color=GREY, linewidth=1.2)
    if math.isfinite(row["low"]):
        axes.plot([factor * row["low"], factor * row["high"]], [y, y], color=look.colour, linewidth=2)
    if math.isfinite(row["difference"]):
        fill = look.colour if row["star"] else PAPER
        axes.plot([factor * row["difference"]], [y], "o", color=look.colour, markerfacecolor=fill, markersize=6)
    said = ", ".join(filter(None, [texts.difference_of(row, percent), _significance(row), f"n = {row['n']}"]))
    where = ("axes fraction", "data")
    beside(axes, y, said if row["n"] else "no pairs", where, va="center", fontsize=SMALL + 0.5)


def _significance(row: Row) -> str:
    if row["m"] == 0 or row["too_small"]:
        return texts.verdict(row)
    return f"p = {texts.probability(row['p_adjusted'])}{'*' if row['star'] else ''}".replace("= <", "< ")


def _label(row: Row) -> str:
    return short(row["wrapper"]) if not row["cell"] else short(f"{row['wrapper']} · {row['generator']}", 36)


def _direction(material: Material) -> str:
    results = material.results
    unit = " in points" if results.percent else ""
    return f"difference{unit}: {'better to the right' if results.maximise else 'better to the left'}"


def _legend(rows: Sequence[Row]) -> list[tuple[str, Line2D]]:
    dot = {"marker": "o", "linestyle": "-", "markersize": 6}
    entries = [("95 % interval over seeds", handle(GREY, markerfacecolor=PAPER, **dot))]
    if any(row["star"] for row in rows):
        entries.append(("p at most 0.05 after correction", handle(GREY, **dot)))
    if any(math.isfinite(row["example_low"]) for row in rows):
        entries.append(("over examples", handle(GREY, linewidth=1.2)))
    return entries


def _title(material: Material, section: str, panel: str) -> str:
    start = f"{material.results.column}, wrapper less bare, paired by seed"
    if section == "effects":
        return f"{start}: averaged over generators" + (" and panels" if len(material.panels) > 1 else "")
    return f"{start}: single cells" + (f", {panel}" if panel else "")


def _alt(rows: Sequence[Row], title: str, percent: bool) -> str:
    told = [
        f"{_label(row)} {texts.difference_of(row, percent)}" if row["n"] else f"{_label(row)} no pairs" for row in rows
    ]
    more = f" and {len(told) - 8} more" if len(told) > 8 else ""
    return f"Forest plot. {title}: {'; '.join(told[:8])}{more}."
