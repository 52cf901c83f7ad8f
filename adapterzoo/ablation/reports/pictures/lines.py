"""Lines over steps: what a quantity does while cells train, the mean of their seeds with the seeds' range."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from adapterzoo.ablation.reports.pictures.material import Material
from adapterzoo.ablation.reports.pictures.picture import Picture
from adapterzoo.ablation.reports.pictures.style import (
    ACROSS,
    Look,
    below,
    headline,
    in_style,
    lines_of,
    looks,
    reference_looks,
    short,
    slug,
    small_multiples,
)  # fmt: skip

_POINTS = 60


class Quantity(NamedTuple):
    """What is drawn.

    Args:
        name: of the picture's file.
        section: of the page.
        title: of the picture.
        label: of the y axis.
    """

    name: str
    section: str
    title: str
    label: str


def thinned(points: pd.DataFrame) -> pd.DataFrame:
    """Points of runs with at most 60 steps: more are put together, step and value averaged.

    Args:
        points: columns run, cell, step, value and others, one row a point.
    """
    steps = np.unique(points["step"])
    if len(steps) <= _POINTS:
        return points
    bins = np.linspace(steps[0], steps[-1] + 1, _POINTS + 1)
    place = np.digitize(points["step"], bins)
    middle = points.groupby(place)["step"].mean()
    found = points.assign(step=middle.loc[place].to_numpy())
    keys = [name for name in found if name != "value"]
    return found.groupby(keys, as_index=False, sort=False)["value"].mean()


@in_style
def line_picture(material: Material, panel: str, points: pd.DataFrame, quantity: Quantity) -> Picture | None:
    """A picture of one panel, an axes a generator; None where nothing was logged.

    Args:
        material: of the report.
        panel: that is shown.
        points: columns run, cell, step, value, and layer where there are any, each then a thin line of its own.
        quantity: what they are.
    """
    cells, references = material.of_panel(panel), material.references(panel)
    shown = set(points["cell"])
    cells, references = cells[cells["cell"].isin(shown)], references[references["cell"].isin(shown)]
    if cells.empty:
        return None
    points = thinned(points[points["cell"].isin({*cells["cell"], *references["cell"]})])
    by_cell = {str(cell): own for cell, own in points.groupby("cell", sort=False)}
    look = looks(material.wrappers, material.results.reference)
    greys = reference_looks(references["cell"])
    generators = list(dict.fromkeys(cells["generator"]))
    figure, every = small_multiples(len(generators))
    for axes, generator in zip(every, generators, strict=True):
        own = cells[cells["generator"] == generator]
        for cell, style in {**greys, **dict(zip(own["cell"], map(look.get, own["wrapper"]), strict=True))}.items():
            _draw(axes, by_cell[cell], style)
        axes.set(title=short(generator), xlabel="step")
    for axes in every[::ACROSS]:
        axes.set_ylabel(quantity.label)
    used = [(wrapper, look[wrapper]) for wrapper in material.wrappers if wrapper in set(cells["wrapper"])]
    beside = [(name, greys[cell]) for name, cell in zip(references["generator"], references["cell"], strict=True)]
    below(figure, lines_of([*used, *beside]))
    title = quantity.title + (f", {panel}" if panel else "")
    headline(figure, title)
    return Picture(slug(quantity.name, panel), quantity.section, panel, title, _alt(by_cell, title), figure)


def _draw(axes: Axes, points: pd.DataFrame, look: Look) -> None:
    """The mean over seeds, with their range; and thin, the mean of each layer."""
    if points.empty:
        return
    if "layer" in points and points["layer"].nunique() > 1:
        for _, layer in points.groupby("layer", sort=False):
            mean = layer.groupby("step")["value"].mean()
            axes.plot(mean.index, mean.to_numpy(), color=look.colour, linewidth=0.5, alpha=0.4)
    by_run = points.groupby(["step", "run"])["value"].mean().groupby("step").agg(["mean", "min", "max"])
    axes.fill_between(by_run.index, by_run["min"], by_run["max"], color=look.colour, alpha=0.09, linewidth=0)
    marker = "o" if len(by_run) == 1 else None
    axes.plot(by_run.index, by_run["mean"], color=look.colour, linestyle=look.dash, marker=marker, markersize=4)


def _alt(by_cell: Mapping[str, pd.DataFrame], title: str) -> str:
    """Where each cell ends."""
    ends = [f"{cell} ends at {_last(points):.4g}" for cell, points in by_cell.items()]
    more = f"; and {len(ends) - 8} more" if len(ends) > 8 else ""
    return f"Lines over steps. {title}: {'; '.join(ends[:8])}{more}."


def _last(points: pd.DataFrame) -> float:
    return float(points[points["step"] == points["step"].max()]["value"].mean())
