"""Which runs are compared with which: wrapper and bare generator of one panel, paired by seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adapterzoo.ablation.reports.results import Results
from adapterzoo.ablation.reports.statistics import Values

_WHY = {"failed": "failed", "missing": "has not run"}


@dataclass(frozen=True)
class Reported:
    """One report run.

    Args:
        run: its name.
        value: of the metric; NaN if there is none.
        why: why there is none, "" if there is one.
    """

    run: str
    value: float
    why: str


@dataclass(frozen=True)
class Pairs:
    """The paired differences of one comparison: of a cell, or of several averaged.

    Args:
        wrapper, generator, panel, cell: the last three are "" where several cells are averaged.
        cells: (cell, bare cell) of each cell in it.
        seeds: that have a pair in every cell of it: n.
        differences: wrapper less bare, averaged over the cells: [n].
        scale: the largest absolute value of the metric among the runs compared.
        lost: for each seed that has no pair, why.
        left_out: cells that are not in the average, and why.
        possible: whether the grid has a bare cell to compare with.
    """

    wrapper: str
    generator: str
    panel: str
    cell: str
    cells: tuple[tuple[str, str], ...]
    seeds: tuple[int, ...]
    differences: Values
    scale: float
    lost: Mapping[int, str]
    left_out: tuple[str, ...] = ()
    possible: bool = True


Runs = Mapping[str, Mapping[int, Reported]]


def reported(results: Results, metric: str) -> Runs:
    """The report runs by cell and seed."""
    runs = results.runs[results.runs["role"] == "report"]
    values = runs[metric] if metric in runs else [math.nan] * len(runs)
    found: dict[str, dict[int, Reported]] = {}
    for run, cell, seed, status, value in zip(
        runs["run"], runs["cell"], runs["seed"], runs["status"], values, strict=True
    ):
        why = _WHY.get(status) or ("" if math.isfinite(value) else f"has no finite {metric}")
        found.setdefault(cell, {})[int(seed)] = Reported(run, math.nan if why else float(value), why)
    return found


def by_cell(results: Results, runs: Runs) -> list[Pairs]:
    """A comparison for each cell with a wrapper, in the grid's order; references are none."""
    table = results.runs[~results.runs["reference"].astype(bool)].drop_duplicates("cell")
    bare = table[table["wrapper"] == results.reference].set_index(["generator", "panel"])["cell"].to_dict()
    wrapped = table[table["wrapper"] != results.reference]
    return [
        _paired(row.wrapper, row.generator, row.panel, row.cell, bare.get((row.generator, row.panel)), runs)
        for row in wrapped.itertuples()
    ]


def _paired(wrapper: str, generator: str, panel: str, cell: str, bare: str | None, runs: Runs) -> Pairs:
    if bare is None:
        why = f"no bare {generator} to compare {cell} with"
        return Pairs(wrapper, generator, panel, cell, (), (), np.zeros(0), 0.0, {}, (why,), possible=False)
    ours, theirs = runs.get(cell, {}), runs.get(bare, {})
    lost = {seed: _lost(seed, {cell: ours, bare: theirs}) for seed in sorted({*ours, *theirs})}
    seeds = tuple(seed for seed, why in lost.items() if not why)
    values = np.array([[ours[seed].value, theirs[seed].value] for seed in seeds]).reshape(-1, 2)
    return Pairs(
        wrapper=wrapper,
        generator=generator,
        panel=panel,
        cell=cell,
        cells=((cell, bare),),
        seeds=seeds,
        differences=values[:, 0] - values[:, 1],
        scale=float(np.abs(values).max(initial=0.0)),
        lost={seed: why for seed, why in lost.items() if why},
    )


def _lost(seed: int, sides: Mapping[str, Mapping[int, Reported]]) -> str:
    """Why a seed is no pair, or nothing."""
    whys = {cell: runs[seed].why if seed in runs else "is not in the grid" for cell, runs in sides.items()}
    return " and ".join(f"{cell} {why}" for cell, why in whys.items() if why)


def by_wrapper(comparisons: Sequence[Pairs]) -> list[Pairs]:
    """A comparison for each wrapper: each seed's difference averaged over generators and panels.

    Only seeds with a pair in every cell count, or else seeds would be averages of different cells. A cell without any
    pair is left out as a whole, and named.
    """
    wrappers = dict.fromkeys(pairs.wrapper for pairs in comparisons)
    return [_averaged(wrapper, [pairs for pairs in comparisons if pairs.wrapper == wrapper]) for wrapper in wrappers]


def _averaged(wrapper: str, every: Sequence[Pairs]) -> Pairs:
    used = [pairs for pairs in every if pairs.seeds]
    seeds = tuple(sorted(set.intersection(*(set(pairs.seeds) for pairs in used)))) if used else ()
    rows = [[pairs.differences[pairs.seeds.index(seed)] for seed in seeds] for pairs in used]
    lost: dict[int, list[str]] = {}
    for pairs in used:
        for seed, why in pairs.lost.items():
            lost.setdefault(seed, []).append(why)
    return Pairs(
        wrapper=wrapper,
        generator="",
        panel="",
        cell="",
        cells=tuple(cell for pairs in used for cell in pairs.cells),
        seeds=seeds,
        differences=np.mean(rows, axis=0) if used else np.zeros(0),
        scale=max((pairs.scale for pairs in used), default=0.0),
        lost={seed: " and ".join(dict.fromkeys(lost[seed])) for seed in sorted(lost)},
        left_out=tuple(_why_out(pairs) for pairs in every if not pairs.seeds),
        possible=any(pairs.possible for pairs in every),
    )


def _why_out(pairs: Pairs) -> str:
    return f"{pairs.cell} has no pair" if pairs.possible else pairs.left_out[0]
