"""What was run, where and when, and what a reader must know before reading on."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from adapterzoo.ablation.reports import texts
from adapterzoo.ablation.reports.pictures.material import Material
from adapterzoo.ablation.reports.results import Results
from adapterzoo.ablation.reports.tables import summary
from adapterzoo.ablation.runs.environment import MATTER
from adapterzoo.ablation.runs.folder import read_grid, records_of
from adapterzoo.errors import count

_TIME = "time"
# Beside what the records' own room names: every package may change what runs compute, or how fast.
_PACKAGES = "packages."
_MACHINE = ("cpu.model", "cpu.cores", "gpus", "device", "threads", "platform", "python", "packages.torch")
_FEW = 6
_NOTHING = "not recorded"
Fact = tuple[str, list[str]]


@dataclass(frozen=True)
class Field:
    """A field of the environment records.

    Args:
        name: dotted.
        values: as text, with the number of runs that have each, most frequent first.
    """

    name: str
    values: tuple[tuple[str, int], ...]

    @property
    def told(self) -> str:
        """Its values in a line."""
        if len(self.values) == 1:
            return self.values[0][0]
        some = ", ".join(f"{value} ({count(runs, 'run')})" for value, runs in self.values[:_FEW])
        return some if len(self.values) <= _FEW else f"{len(self.values):,} different values: {some}, ..."

    @property
    def differs(self) -> bool:
        """Whether runs that should be alike differ in it."""
        matters = self.name in MATTER or self.name.startswith(_PACKAGES)
        return matters and len([value for value, _ in self.values if value != _NOTHING]) > 1


def fields(environments: pd.DataFrame) -> list[Field]:
    """Every field of the environment records.

    Args:
        environments: one row a run.
    """
    names = [str(name) for name in environments if name != "run"]
    return [Field(name, tuple(Counter(map(_text, environments[name])).most_common())) for name in names]


def _text(value: Any) -> str:
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, sort_keys=True) if value else "none"
    if value is None or value is pd.NA or value != value:
        return _NOTHING
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def facts(material: Material, every: Iterable[Field]) -> list[Fact]:
    """What was run, as terms with their values.

    Args:
        material: of the report.
        every: the fields of the environment records.
    """
    results = material.results
    grid, by = results.grid, {field.name: field for field in every}
    found = [
        ("task", [_options(grid["task"])]),
        *_axes(grid),
        ("references", [reference["label"] or reference["spec"] for reference in grid.get("references") or ()]),
        ("search", [_search(grid["tune"])] if grid.get("tune") else []),
        ("compared by", [f"{results.column}, {'more' if results.maximise else 'less'} is better"]),
        ("runs", summary(results)[:1]),
        ("time of all runs", [_duration(results.runs["seconds"].sum())]),
        ("dates", _dates(results)),
        ("machine", _machine(by)),
        *_versions(results),
    ]
    return [(name, values) for name, values in found if values]


def _axes(grid: Mapping[str, Any]) -> Iterator[Fact]:
    products = grid["grid"]
    for number, axes in enumerate(products, 1):
        of = f" ({number} of {len(products)})" if len(products) > 1 else ""
        yield f"generators{of}", list(axes["spec"].values())
        yield f"wrappers{of}", list(axes["wrap"].values())
        for name, values in axes["others"].items():
            yield f"{name}{of}", [", ".join(map(str, values))]
    seeds = next((axes["seed"] for axes in products if axes.get("seed")), None)
    yield "seeds", [", ".join(map(str, seeds))] if seeds else []


def _options(options: Mapping[str, Any]) -> str:
    rest = ", ".join(f"{name} = {_text(value)}" for name, value in options.items() if name != "name")
    return f"{options['name']}: {rest}" if rest else str(options["name"])


def _search(tune: Mapping[str, Any]) -> str:
    ranges = [
        f"{name} {kind} {_text(list(values))}"
        for name, option in tune["options"].items()
        for kind, values in option.items()
        if values is not None
    ]
    seeds = ", ".join(map(str, tune["seeds"]))
    trials = count(tune["trials"], "point") if tune.get("trials") else "all values"
    return f"{'; '.join(ranges)}: {trials} for every cell, on {tune['on']}, seed {seeds}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _dates(results: Results) -> list[str]:
    """From the first to the last, of what the records say."""
    environments = results.environments
    told = sorted(map(str, environments[_TIME].dropna())) if _TIME in environments else []
    return [told[0] if told[0] == told[-1] else f"{told[0]} to {told[-1]}"] if told else []


def _machine(by: Mapping[str, Field]) -> list[str]:
    return [f"{name.replace('.', ' ')}: {by[name].told}" for name in _MACHINE if name in by]


def _versions(results: Results) -> Iterator[Fact]:
    """Code and data, as the grid's record has them; the cells of several tasks have several."""
    records = records_of(read_grid(results.folder))
    yield "code", list(dict.fromkeys(record.code for record in records))
    yield "data", list(dict.fromkeys(record.data for record in records))


def warnings(material: Material, every: Iterable[Field]) -> list[str]:
    """What may make the numbers say less than they seem to, one sentence each.

    Args:
        material: of the report.
        every: the fields of the environment records.
    """
    return [
        *_unfinished(material.results),
        *summary(material.results)[1:],
        *_not_drawn(material),
        *_differences(every),
        *_edges(material),
    ]


def _unfinished(results: Results) -> Iterator[str]:
    runs = results.runs
    for role, what in (("tune", "runs of the search"), ("report", "reported runs")):
        own = runs[runs["role"] == role]["status"]
        for status, verb in (("failed", "failed"), ("missing", "not ended")):
            number = int((own == status).sum())
            if number:
                yield f"{number:,} of {len(own):,} {what} {'has' if number == 1 else 'have'} {verb}."


def _differences(every: Iterable[Field]) -> Iterator[str]:
    differing = [field for field in every if field.differs]
    if differing:
        told = "; ".join(f"{field.name}: {field.told}" for field in differing)
        yield f"The runs of this report are not from one machine with one set of packages: {told}."


def _not_drawn(material: Material) -> Iterator[str]:
    more = len(material.panels) - len(material.drawn)
    if more:
        yield f"Pictures show the first {len(material.drawn)} of {len(material.panels)} panels; the tables have all."


def _edges(material: Material) -> Iterator[str]:
    table = material.cells
    rows = table[table["edge"].astype(bool)].to_dict("records")
    if rows:
        told = "; ".join(f"{row['cell']}: {texts.options_of(row)}" for row in rows[:_FEW])
        told += f"; and {len(rows) - _FEW} more" if len(rows) > _FEW else ""
        yield (
            f"{len(rows)} of {count(len(table), 'cell')} {'is' if len(rows) == 1 else 'are'} at an end of what the "
            f"search tried, so a better value may lie beyond: {told}."
        )
