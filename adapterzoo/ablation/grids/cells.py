"""Cells: what a grid's axes come to, each a composition on a task."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterzoo.ablation.grids.axes import BARE, Combination, combinations, placeholders
from adapterzoo.ablation.grids.outline import Outline, Reference
from adapterzoo.ablation.grids.tune import Point, Tune
from adapterzoo.ablation.tasks.registry import make_task, task_class
from adapterzoo.ablation.tasks.task import Task
from adapterzoo.errors import AdapterError, GridError, did_you_mean, listing
from adapterzoo.pieces import Piece
from adapterzoo.registry import parse

HEAD_ALONE = "None"


@dataclass(frozen=True)
class Cell:
    """One composition on one task.

    Args:
        name: unique in its grid.
        generator, wrapper: labels of its row and column; "bare" where there is no wrapper.
        spec: what adapts the model; None trains the head alone.
        reference: whether it stands beside the grid.
        panel: text of the other axes that vary, such as "r=8"; "" if none does.
        axes: values of the other axes that it uses.
        task: with the options of its axes.
        tune: its search, if any.
    """

    name: str
    generator: str
    wrapper: str
    spec: Piece | None
    reference: bool
    panel: str
    axes: Mapping[str, Any]
    task: Task
    tune: Tune | None

    @property
    def spec_text(self) -> str | None:
        """The composition in its canonical form."""
        return None if self.spec is None else repr(self.spec)

    def points(self) -> list[Point]:
        """What its search tries; one empty point without a search."""
        return self.tune.points() if self.tune else [{}]

    def task_at(self, point: Point) -> Task:
        """Its task with other values of the tuned options."""
        return make_task({"name": self.task.name, **self.task.model_dump(), **point})


def cells(grid: Outline) -> list[Cell]:
    """Every cell of a grid: references first, then the products in the order of their axes.

    Raises:
        GridError: a task, option, axis, template or spec that can't be read, a tuned option that the task does not
            have, or cells that are the same; all that are found.
    """
    if not isinstance(grid.task.get("name"), str):
        make_task(grid.task)  # says what is missing
    options = set(task_class(grid.task["name"]).model_fields)
    _check_axes(grid, options)
    make_task({**grid.task, **next(iter(_option_values(grid, options)), {})})  # once, before every cell says it again
    varying = _varying(grid)
    problems: list[str] = []
    found: list[Cell] = []
    for combination, reference in _all_combinations(grid, options):
        try:
            found.append(_cell(grid, combination, reference, options, varying))
        except AdapterError as error:
            problems.append(f"{combination.text}: {error}")
    problems += _repeated(found)
    if problems:
        raise GridError(f"these cells can't work:{listing(problems)}")
    return found


def _all_combinations(grid: Outline, options: set[str]) -> list[tuple[Combination, Reference | None]]:
    """Every combination, with the reference that it comes from."""
    found: list[tuple[Combination, Reference | None]] = []
    for reference in grid.references:
        label = reference.label or reference.spec
        found += [
            (Combination(label, BARE, reference.spec, values), reference) for values in _option_values(grid, options)
        ]
    return found + [(item, None) for axes in grid.grid for item in combinations(axes, options)]


def _option_values(grid: Outline, options: set[str]) -> list[dict[str, Any]]:
    """The values of axes that are options of the task, as they come together in the grid; each once."""
    found: list[dict[str, Any]] = []
    for axes in grid.grid:
        for item in combinations(axes, options):
            values = {name: value for name, value in item.values.items() if name in options}
            if values not in found:
                found.append(values)
    return found


def _cell(
    grid: Outline, item: Combination, reference: Reference | None, options: set[str], varying: Sequence[str]
) -> Cell:
    spec = None if item.text.strip() == HEAD_ALONE else parse(item.text)
    chosen = {name: value for name, value in item.values.items() if name in options}
    task = make_task({**grid.task, **chosen})
    tune = reference.tune if reference is not None and reference.tune is not None else grid.tune
    _check_tune(task, tune, grid.tune, set(item.values))
    panel = ", ".join(f"{name}={item.values[name]}" for name in varying if name in item.values)
    on = ", ".join(f"{name}={value}" for name, value in chosen.items() if name in varying)
    label = item.generator if reference is not None else " ".join(item.text.split())
    name = f"{label} [{on}]" if on else label
    return Cell(name, item.generator, item.wrapper, spec, reference is not None, panel, item.values, task, tune)


def _check_axes(grid: Outline, options: set[str]) -> None:
    problems = []
    for axes in grid.grid:
        names = set(axes.others)
        for name in sorted(names - options - axes.placeholders()):
            known = sorted(options | axes.placeholders())
            problems.append(
                f"axis {name!r} is neither in a template, as {{{name}}}, nor an option of the task "
                f"{grid.task['name']!r}{did_you_mean(name, known)}"
            )
        problems += [
            f"{{{name}}} stands in a template, but no axis has that name{did_you_mean(name, names)}"
            for name in sorted(axes.placeholders() - names)
        ]
        problems += [f"{name!r} is set both as an option of the task and as an axis" for name in names & set(grid.task)]
    for reference in grid.references:
        problems += [
            f"reference {reference.spec!r} holds {{{name}}}; references take no axes"
            for name in sorted(placeholders(reference.spec))
        ]
    if problems:
        raise GridError(f"the axes can't be used:{listing(problems)}")


def _check_tune(task: Task, tune: Tune | None, common: Tune | None, axes: set[str]) -> None:
    if tune is None:
        return
    fields = type(task).model_fields
    for name in tune.options:
        if name not in fields:
            raise GridError(f"tune: the task {task.name!r} has no option {name!r}{did_you_mean(name, fields)}")
        if name in axes:
            raise GridError(f"tune: {name!r} is an axis of the grid too; leave one of them out")
    if common is None or _budget(tune) != _budget(common):
        least = 0 if common is None else _budget(common)
        raise GridError(f"its search has {_budget(tune)} runs and the grid's {least}: every cell has the same budget")
    for point in tune.points():
        make_task({"name": task.name, **task.model_dump(), **point})


def _budget(tune: Tune) -> int:
    return len(tune.points()) * len(tune.seeds)


def _varying(grid: Outline) -> list[str]:
    """Axes that have more than one value over the whole grid, in their order."""
    values: dict[str, set[str]] = {}
    for axes in grid.grid:
        for name, given in axes.others.items():
            values.setdefault(name, set()).update(map(repr, given))
    return [name for name, found in values.items() if len(found) > 1]


def _repeated(found: Sequence[Cell]) -> list[str]:
    """Cells that are the same composition on the same task, and different ones under one label."""
    first: dict[tuple[str | None, Task], int] = {}
    problems = [
        f"{cell.name}: {found[earlier].name} is the same composition on the same task; write it once"
        for index, cell in enumerate(found)
        if (earlier := first.setdefault((cell.spec_text, cell.task), index)) < index
    ]
    places = Counter((cell.generator, cell.wrapper, cell.panel, cell.reference) for cell in found)
    names = Counter(cell.name for cell in found)
    return problems or [
        f"{' under '.join(map(str, place[:2]))}: {number} different cells are called that; give `spec` or `wrap` as a "
        "mapping from labels of your own to templates"
        for place, number in [*places.items(), *(((name,), number) for name, number in names.items())]
        if number > 1
    ]
