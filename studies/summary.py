"""From runs to what the page says of them: means, paired differences, ranks and where importance comes from."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from adapterzoo.ablation.reports import statistics

Run = Mapping[str, Any]
Numbers = NDArray[np.float64]
Interval = tuple[float, float]
"""Mean and half-width."""


@dataclass(frozen=True)
class Difference:
    """Left less right, in points of accuracy and in MRR, over the seeds that both have.

    Args:
        seeds: how many.
        accuracy, mrr: mean and half-width of the 95 % t interval over seeds.
        accuracy_sampling, mrr_sampling: ± 1.96 standard errors over the test docstrings, the difference of each of
            them averaged over the seeds first.
    """

    left: str
    right: str
    seeds: int
    accuracy: Interval
    mrr: Interval
    accuracy_sampling: float
    mrr_sampling: float


def t_interval(values: Iterable[float]) -> Interval:
    """Mean and half-width of Student's 95 % t interval; below two values it has no width."""
    sample = list(values)
    if len(sample) < 2:
        return (sample[0] if sample else math.nan), math.nan
    found = statistics.t_interval(sample)
    return found.mean, found.high - found.mean


def reported(result: Mapping[str, Any], arm: str) -> dict[int, Run]:
    """The reported runs of an arm by their seed."""
    return {run["seed"]: run for run in result["runs"] if run["arm"] == arm and run["role"] == "report"}


def tuned(result: Mapping[str, Any], arm: str) -> dict[float, float]:
    """Validation MRR of every learning rate that an arm tried."""
    return {run["lr"]: run["mrr"] for run in result["runs"] if run["arm"] == arm and run["role"] == "tune"}


def edge(result: Mapping[str, Any], arm: str) -> str:
    """At which edge of the tried rates the chosen one lies: "min", "max" or ""."""
    tried, runs = tuned(result, arm), reported(result, arm)
    if not tried or not runs:
        return ""
    chosen = next(iter(runs.values()))["lr"]
    return "min" if chosen == min(tried) else "max" if chosen == max(tried) else ""


def interval(runs: Mapping[int, Run], measure: str) -> Interval:
    """Mean and half-width of the 95 % t interval over seeds."""
    return t_interval(run[measure] for run in runs.values())


def difference(result: Mapping[str, Any], left: str, right: str) -> Difference:
    """Paired by seed and docstring."""
    ours, theirs = reported(result, left), reported(result, right)
    seeds = sorted(ours.keys() & theirs.keys())
    gaps = {name: t_interval(ours[s][name] - theirs[s][name] for s in seeds) for name in ("accuracy", "mrr")}
    errors = (half_width(np.mean([of(ours[s]) - of(theirs[s]) for s in seeds], axis=0)) for of in (hits, reciprocals))
    return Difference(left, right, len(seeds), gaps["accuracy"], gaps["mrr"], *errors)


def gain(result: Mapping[str, Any], arm: str) -> Interval:
    """Accuracy less that of the encoder as it was published: the mean, and ± 1.96 standard errors over docstrings."""
    before = hits(result["zero_shot"]["test"])
    each = np.mean([hits(run) - before for run in reported(result, arm).values()], axis=0)
    return float(each.mean()), half_width(each)


def half_width(each: Numbers) -> float:
    """1.96 standard errors of a mean over test docstrings, taken as independent draws; each: [n]."""
    return float(1.96 * each.std(ddof=1) / math.sqrt(len(each)))


def hits(run: Run) -> Numbers:
    """1 where a docstring found its own function first: [n]."""
    return np.array([float(place == 1) for place in run["places"]])


def reciprocals(run: Run) -> Numbers:
    """1 / the place at which a docstring found its own function: [n]."""
    return np.array([1 / place for place in run["places"]])


def trace(run: Run) -> NDArray[np.int64]:
    """Ranks of every layer after every step: [steps, layers]."""
    return np.array([[int(digit) for digit in line] for line in run["ranks"]])


def mean_trace(runs: Iterable[Run]) -> Numbers:
    """The mean over runs: [steps, layers]."""
    return np.array(np.mean([trace(run) for run in runs], axis=0))


def final(run: Run) -> NDArray[np.int64]:
    """Ranks at the end: [layers]."""
    last: NDArray[np.int64] = trace(run)[-1]
    return last


def agreement(first: Run, second: Run) -> float:
    """Spearman's correlation of the final ranks over the layers; NaN if one has the same rank everywhere."""
    one, other = final(first), final(second)
    if min(len(set(one)), len(set(other))) < 2:
        return math.nan
    return float(stats.spearmanr(one, other).statistic)


def same_seed(result: Mapping[str, Any], left: str, right: str) -> list[float]:
    """Agreement of two arms, for every seed that both have."""
    ours, theirs = reported(result, left), reported(result, right)
    return [agreement(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def same_arm(result: Mapping[str, Any], arm: str) -> list[float]:
    """Agreement of an arm with itself, for every two seeds: what the seed alone does."""
    return [agreement(one, other) for one, other in combinations(reported(result, arm).values(), 2)]


def moved(result: Mapping[str, Any], left: str, right: str) -> float:
    """How many layers end with another rank in one arm than in the other, on average over seeds."""
    ours, theirs = reported(result, left), reported(result, right)
    seeds = ours.keys() & theirs.keys()
    return float(np.mean([(final(ours[seed]) != final(theirs[seed])).sum() for seed in seeds]))


def shares(result: Mapping[str, Any], arm: str, steps: slice) -> Sequence[float]:
    """The penalty's share of the importance, mean over those steps, for every seed."""
    return [float(np.mean(run["penalty_share"][steps])) for run in reported(result, arm).values()]


def by_kind(result: Mapping[str, Any], arm: str) -> dict[str, Numbers]:
    """Mean final rank of every kind of layer in every block, over seeds: kind -> [blocks]."""
    runs = list(reported(result, arm).values())
    ranks = np.mean([final(run) for run in runs], axis=0)
    kinds: dict[str, list[float]] = {}
    for name, rank in zip(runs[0]["layers"], ranks, strict=True):
        kinds.setdefault(kind_of(name), []).append(float(rank))
    return {kind: np.array(values) for kind, values in kinds.items()}


def kind_of(layer: str) -> str:
    """What a layer is, in short: "encoder.layer.3.attention.self.query" is a "query"."""
    tail = layer.split(".", 3)[-1]
    return {
        "attention.self.query": "query", "attention.self.key": "key", "attention.self.value": "value",
        "attention.output.dense": "attention out", "intermediate.dense": "up", "output.dense": "down",
    }.get(tail, tail)  # fmt: skip
