"""Tuning curves: what the search saw on the validation part, and what it chose."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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


class Searched(NamedTuple):
    """The search of one cell.

    Args:
        cell: its name.
        points: columns option, value and chosen, one row a point.
        look: of its line.
        at_end: whether the chosen option lies at an end of those tried.
    """

    cell: str
    points: pd.DataFrame
    look: Look
    at_end: bool


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
    tried = pd.concat([one.points for lines in groups.values() for one in lines])["option"]
    for axes, (title, lines) in zip(every, groups.items(), strict=True):
        place = _scale(axes, tried)
        for one in lines:
            _draw(axes, one, place, joined=len(material.results.tuned) == 1)
        axes.set(title=short(title), xlabel=option)
    unit = " in %" if material.results.percent else ""
    for axes in every[::ACROSS]:
        axes.set_ylabel(f"validation/{material.results.metric}{unit}")
    below(figure, _legend(material, panel))
    title = f"Search of {option} on the validation part: ring, chosen; triangle, chosen at an end of its range"
    title += f", {panel}" if panel else ""
    headline(figure, title)
    return Picture(slug("tuning", option, panel), "tuning", panel, title, _alt(groups, option), figure)


def _groups(material: Material, trials: pd.DataFrame, option: str, panel: str) -> dict[str, list[Searched]]:
    """The searches of each generator that was tuned, and of the references."""
    cells, references = material.of_panel(panel), material.references(panel)
    look = looks(material.wrappers, material.results.reference)
    greys = reference_looks(references["cell"])
    found: dict[str, list[Searched]] = {}
    for row in [*cells.to_dict("records"), *references.to_dict("records")]:
        points = _points(material, trials[trials["cell"] == row["cell"]], row, option)
        if len(points):
            group = REFERENCES if row["reference"] else row["generator"]
            style = greys[row["cell"]] if row["reference"] else look[row["wrapper"]]
            at_end = option in [part.split(" ")[0] for part in row["edge"].split(", ")]
            found.setdefault(group, []).append(Searched(row["cell"], points, style, at_end))
    return found


def _points(material: Material, trials: pd.DataFrame, cell: Mapping[Any, Any], option: str) -> pd.DataFrame:
    """One row a point of a cell's search: the option, the mean over seeds, and whether it was chosen."""
    column = f"validation/{material.results.metric}"
    if trials.empty or column not in trials:
        return pd.DataFrame()
    every = [f"option/{name}" for name in material.results.tuned]
    means = trials.groupby(every, sort=False, dropna=False)[column].mean().dropna().reset_index()
    chosen = [all(point[name] == cell[name] for name in every) for point in means.to_dict("records")]
    factor = 100 if material.results.percent else 1
    found = pd.DataFrame({"option": means[f"option/{option}"], "value": factor * means[column], "chosen": chosen})
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


def _draw(axes: Axes, one: Searched, place: Mapping[Hashable, float], joined: bool) -> None:
    """The points, joined where one option alone was tuned; the chosen one is ringed."""
    x = [place[value] for value in one.points["option"]]
    line = one.look.dash if joined else "none"
    axes.plot(x, one.points["value"].to_numpy(), color=one.look.colour, linestyle=line, marker=".", markersize=5)
    for point in one.points[one.points["chosen"]].itertuples():
        ring: dict[str, Any] = {"markerfacecolor": "none", "markersize": 9, "markeredgewidth": 1.4}
        axes.plot([place[point.option]], [point.value], "^" if one.at_end else "o", color=one.look.colour, **ring)


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


def _alt(groups: Mapping[str, Sequence[Searched]], option: str) -> str:
    told = [
        f"{one.cell} {value}{' (at an end)' if one.at_end else ''}"
        for lines in groups.values()
        for one in lines
        for value in one.points[one.points["chosen"]]["option"]
    ]
    more = f" and {len(told) - 8} more" if len(told) > 8 else ""
    return f"Lines of the validation metric over {option}. Chosen: {'; '.join(told[:8]) or 'none yet'}{more}."
