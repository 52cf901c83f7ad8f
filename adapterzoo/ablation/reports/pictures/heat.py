"""Heat maps: the mean of every cell, wrappers by generators, a picture a panel."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from adapterzoo.ablation.reports import texts
from adapterzoo.ablation.reports.pictures.material import Material
from adapterzoo.ablation.reports.pictures.picture import Picture
from adapterzoo.ablation.reports.pictures.style import GREY, SMALL, headline, in_style, short, slug

_WIDE, _HIGH = 1.12, 0.62
Row = Mapping[Any, Any]
Square = tuple[str, Row | None]
"""What is written below the mean, and the cell; None where the grid has none."""


def heat_maps(material: Material) -> Iterator[Picture]:
    """A picture a panel in which a run is done: shades are the same for all panels of one problem.

    Args:
        material: of the report.
    """
    for panel in material.drawn:
        if material.of_panel(panel)["n"].any():
            yield _heat_map(material, panel)


@in_style
def _heat_map(material: Material, panel: str) -> Picture:
    results = material.results
    squares = _squares(material, panel)
    references = material.references(panel).to_dict("records")
    shades = _shades(material, panel)
    figure, axes, beside = _layout(material, len(references))
    _draw(axes, squares, shades, material)
    axes.set_xticks(range(len(material.generators)), [short(name, 16) for name in material.generators])
    axes.set_yticks(range(len(material.wrappers)), [short(name) for name in material.wrappers])
    if beside is not None:
        _draw(beside, [[_square(row, "")] for row in references], shades, material)
        beside.set_xticks([0], ["references"])
        beside.yaxis.tick_right()
        beside.set_yticks(range(len(references)), [short(row["generator"], 16) for row in references])
    unit = " in %" if results.percent else ""
    bar = ScalarMappable(shades, _colours(material))
    every = [axes] if beside is None else [axes, beside]
    figure.colorbar(bar, ax=every, location="bottom", shrink=0.6, aspect=40, label=f"{results.column}{unit}")
    title = f"{results.column}{unit}" + (f", {panel}" if panel else "")
    headline(figure, title)
    return Picture(slug("heat", panel), "heat", panel, title, _alt(material, squares, title), figure)


def _layout(material: Material, references: int) -> tuple[Figure, Axes, Axes | None]:
    across, down = len(material.generators), max(len(material.wrappers), references)
    width = _WIDE * (across + (1.9 if references else 0)) + 1.3
    figure = Figure(figsize=(max(4.2, width), _HIGH * down + 1.5), layout="constrained")
    if not references:
        return figure, figure.subplots(), None
    ratios = {"width_ratios": (across, 1), "height_ratios": (references, down - references or 1e-6)}
    places = figure.add_gridspec(2, 2, **ratios)
    return figure, figure.add_subplot(places[:, 0]), figure.add_subplot(places[0, 1])


def _squares(material: Material, panel: str) -> list[list[Square]]:
    cells = {(row["wrapper"], row["generator"]): row for row in material.of_panel(panel).to_dict("records")}
    effects = material.effects
    starred = set(effects[effects["star"].astype(bool)]["cell"])
    every = [[cells.get((wrapper, name)) for name in material.generators] for wrapper in material.wrappers]
    return [
        [("", None) if row is None else _square(row, "*" * (row["cell"] in starred)) for row in line] for line in every
    ]


def _square(row: Row, star: str) -> Square:
    return star, row


def _shades(material: Material, panel: str) -> Normalize:
    """From the worst to the best mean of the panel's problem, references included; of one mean alone, around it."""
    table = material.cells
    problem = material.problems.get(material.of_panel(panel)["cell"].iloc[0])
    means = table["mean"][[material.problems.get(cell) == problem for cell in table["cell"]]].dropna()
    if means.empty:
        return Normalize(0.0, 1.0)
    factor = 100 if material.results.percent else 1
    low, high = factor * means.min(), factor * means.max()
    return Normalize(low, high) if low < high else Normalize(low - 0.5, high + 0.5)


def _colours(material: Material) -> str:
    return "cividis" if material.results.maximise else "cividis_r"


def _draw(axes: Axes, squares: Sequence[Sequence[Square]], shades: Normalize, material: Material) -> None:
    percent = material.results.percent
    means = [
        [math.nan if row is None else row["mean"] * (100 if percent else 1) for _, row in line] for line in squares
    ]
    colours = colormaps[_colours(material)]
    axes.imshow(np.ma.masked_invalid(means), cmap=colours, norm=shades, aspect="auto")
    for (y, x), mean in np.ndenumerate(np.array(means, dtype=float)):
        star, row = squares[y][x]
        first, second = ("", "not in\nthe grid") if row is None else _texts(row, star, percent)
        ink = GREY if math.isnan(mean) else _readable(colours(shades(mean)))
        axes.text(x, y - (0.14 if first else 0), first, ha="center", va="center", color=ink, fontsize=10)
        axes.text(x, y + (0.23 if first else 0), second, ha="center", va="center", color=ink, fontsize=SMALL)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _texts(row: Row, star: str, percent: bool) -> tuple[str, str]:
    """The mean, and what stands below it: the interval, or how many runs there are where some are not done."""
    if not row["n"]:
        return "", "failed" if row["failed"] else "no number" if row["done"] else "no runs yet"
    few = f"n = {row['n']} of {row['planned']}" if row["n"] < row["planned"] else ""
    interval = texts.bounds(row["low"], row["high"], percent).replace(texts.NONE, "")
    below = "all equal" if row["method"] == "equal" else interval
    return f"{texts.amount(row['mean'], percent)}{star}", "\n".join(filter(None, [below, few]))


def _readable(colour: tuple[float, ...]) -> str:
    """White on dark, black on light."""
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3])
    return "#ffffff" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.18 else "#000000"


def _alt(material: Material, squares: Sequence[Sequence[Square]], title: str) -> str:
    known = pd.DataFrame([row for line in squares for _, row in line if row is not None and row["n"]])
    if known.empty:
        return f"Heat map of {title}: no run is done."
    ordered = known.sort_values("mean", ascending=not material.results.maximise)
    best, worst = (texts.mean_of(ordered.iloc[place], material.results.percent) for place in (0, -1))
    return (
        f"Heat map of {title}, wrappers by generators, {len(known)} cells: best {ordered.iloc[0]['cell']} {best}, "
        f"worst {ordered.iloc[-1]['cell']} {worst}. The table of cells has every number."
    )
