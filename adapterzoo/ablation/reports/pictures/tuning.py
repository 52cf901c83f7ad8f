"""Tuning curves: what the search saw on the validation part, and what it chose."""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from adapterzoo.ablation.reports.pictures.material import Material
from adapterzoo.ablation.reports.pictures.picture import Picture
from adapterzoo.ablation.reports.pictures.style import (
    ACROSS,
    INK,
    Look,
    below,
    handle,
    headline,
    in_style,
    lines_of,
    looks,
    plain_ticks,
    reference_looks,
    short,
    slug,
    small_multiples,
)  # fmt: skip

_DECADE = 10
REFERENCES = "references"
Lines = dict[str, tuple[pd.DataFrame, Look]]


def tuning_curves(material: Material) -> Iterator[Picture]:
    """A picture for each panel and tuned option: the validation metric of every cell over it, the chosen value ringed.

    Args:
        material: of the report.
    """
    runs = material.results.runs
    trials = runs[(runs["role"] == "tune") & (runs["status"] == "done")]
    for option in material.results.tuned:
        for panel in material.drawn:
            picture = _tuning(material, trials, option, panel)
            if picture is not None:
                yield picture


@in_style
def _tuning(material: Material, trials: pd.DataFrame, option: str, panel: str) -> Picture | None:
    groups = _groups(material, trials, option, panel)
    if not groups:
        return None
    figure, every = small_multiples(len(groups))
    chosen = material.cells.set_index("cell")
    tried = pd.concat([points for lines in groups.values() for points, _ in lines.values()])["option"]
    for axes, (title, lines) in zip(every, groups.items(), strict=True):
        place = _scale(axes, tried)
        for cell, (points, look) in lines.items():
            _draw(axes, points, look, place, chosen.loc[cell], option, joined=len(material.results.tuned) == 1)
        axes.set(title=short(title), xlabel=option)
    unit = " in %" if material.results.percent else ""
    for axes in every[::ACROSS]:
        axes.set_ylabel(f"validation/{material.results.metric}{unit}")
    below(figure, _legend(material, panel))
    title = f"Search of {option} on the validation part: ring, chosen; triangle, chosen at an end of its range"
    title += f", {panel}" if panel else ""
    headline(figure, title)
    return Picture(slug("tuning", option, panel), "tuning", panel, title, _alt(groups, chosen, option), figure)


def _groups(material: Material, trials: pd.DataFrame, option: str, panel: str) -> dict[str, Lines]:
    """For each generator that was tuned, and for the references: points and look of every cell."""
    cells, references = material.of_panel(panel), material.references(panel)
    look = looks(material.wrappers, material.results.reference)
    greys = reference_looks(references["cell"])
    rows = [(row.generator, row.cell, look[row.wrapper]) for row in cells.itertuples()]
    rows += [(REFERENCES, cell, grey) for cell, grey in greys.items()]
    found: dict[str, Lines] = {}
    for group, cell, style in rows:
        points = _points(material, trials[trials["cell"] == cell], option)
        if len(points):
            found.setdefault(group, {})[cell] = (points, style)
    return found


def _points(material: Material, trials: pd.DataFrame, option: str) -> pd.DataFrame:
    """Columns option and value: one row a point of the search, the mean over its seeds."""
    column = f"validation/{material.results.metric}"
    if trials.empty or column not in trials:
        return pd.DataFrame({"option": [], "value": []})
    every = [f"option/{name}" for name in material.results.tuned]
    means = trials.groupby(every, sort=False, dropna=False)[column].mean().dropna().reset_index()
    factor = 100 if material.results.percent else 1
    found = pd.DataFrame({"option": means[f"option/{option}"], "value": factor * means[column]})
    return found.sort_values("option", key=lambda values: values.map(_order), kind="stable")


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then all else by text."""
    return (0, float(value), "") if _is_number(value) else (1, 0.0, str(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scale(axes: Axes, tried: pd.Series) -> Mapping[Hashable, float]:
    """Where each value stands on the x axis; what is no number has a place of its own."""
    values = sorted(set(tried), key=_order)
    if not all(map(_is_number, values)):
        axes.set_xticks(range(len(values)), [short(str(value), 12) for value in values])
        return {value: float(place) for place, value in enumerate(values)}
    if values[0] > 0 and values[-1] / values[0] >= _DECADE:
        axes.set_xscale("log")
        plain_ticks(axes)
    return {value: float(value) for value in values}


def _draw(axes: Axes, points: pd.DataFrame, look: Look, place: Mapping[Hashable, float], cell: pd.Series, option: str,
          joined: bool) -> None:  # fmt: skip
    x = [place[value] for value in points["option"]]
    line = look.dash if joined else "none"
    axes.plot(x, points["value"].to_numpy(), color=look.colour, linestyle=line, marker=".", markersize=5)
    best = points[points["option"] == cell[f"option/{option}"]].sort_values("value")
    if len(best):
        at_end = f"{option} " in f"{cell['edge']} "
        axes.plot(
            [place[best["option"].iloc[-1]]], [best["value"].iloc[-1]], "^" if at_end else "o", color=look.colour,
            markerfacecolor="none", markersize=9, markeredgewidth=1.4,
        )  # fmt: skip


def _legend(material: Material, panel: str) -> Sequence[tuple[str, Line2D]]:
    own, references = set(material.of_panel(panel)["wrapper"]), material.references(panel)
    beside = zip(references["generator"], reference_looks(references["cell"]).values(), strict=True)
    look = looks(material.wrappers, material.results.reference)
    ring = {"linestyle": "", "markerfacecolor": "none", "markersize": 8}
    return [
        *lines_of((name, style) for name, style in look.items() if name in own),
        *lines_of(beside),
        ("chosen", handle(INK, marker="o", **ring)),
        ("chosen at an end", handle(INK, marker="^", **ring)),
    ]


def _alt(groups: Mapping[str, Lines], chosen: pd.DataFrame, option: str) -> str:
    told = []
    for cell in (cell for lines in groups.values() for cell in lines):
        value, edge = chosen.loc[cell, f"option/{option}"], chosen.loc[cell, "edge"]
        if value is not None and not (isinstance(value, float) and math.isnan(value)):
            told.append(f"{cell} {value}{f' ({edge})' if edge else ''}")
    more = f" and {len(told) - 8} more" if len(told) > 8 else ""
    return f"Lines of the validation metric over {option}. Chosen: {'; '.join(told[:8])}{more}."
