"""Times of several candidates, interleaved in one process and compared pair by pair.

A round runs every candidate once, in an order of its own, drawn at random. Each candidate's time is divided by the
reference's time in the same round, and the median of these ratios is reported with a bootstrap interval. Slow drifts
of the machine (clock, temperature, neighbours) fall on both sides of a ratio and cancel; a control, which is the
reference built a second time, shows what is left of them.
"""

import gc
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
import torch
from scipy import stats

Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """One candidate's times, next to the reference's in the same rounds.

    Attributes:
        seconds: median time of a step.
        ratio: median over the rounds of this candidate's time / the reference's.
        low, high: 95 % percentile bootstrap interval of that median.
        all_seconds: every time, by round.
    """

    seconds: float
    ratio: float
    low: float
    high: float
    all_seconds: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Every candidate's timing by name, and over how many rounds. `against` takes another candidate as reference."""

    timings: dict[str, Timing]
    reference: str
    pairs: int
    seed: int

    def against(self, reference: str) -> "Comparison":
        """The same times, with the ratios to another candidate."""
        times = {name: list(timing.all_seconds) for name, timing in self.timings.items()}
        return summarise(times, reference, self.pairs, self.seed)


def compare(
    candidates: Mapping[str, Step], reference: str, pairs: int, seed: int = 0, warm_up: int = 3, cuda: bool = False
) -> Comparison:
    """Time the candidates in `pairs` rounds, after `warm_up` rounds that are not kept.

    Args:
        candidates: what to run once per round, by name; the reference is one of them.
        reference: the name that ratios are taken to.
        pairs: how many rounds are kept; none is dropped.
        seed: seed of the orders and of the bootstrap.
        warm_up: rounds before the first that is kept.
        cuda: wait for the device before and after every step.
    """
    order, stream = list(candidates), random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    gc.freeze()  # what stands now is not looked at again, so the collections between rounds are short
    try:
        for number in range(warm_up + pairs):
            stream.shuffle(order)
            for name in order:
                seconds = _time(candidates[name], cuda)
                if number >= warm_up:
                    times[name].append(seconds)
    finally:
        gc.unfreeze()
    return summarise(times, reference, pairs, seed)


def pairs_within(seconds: float, candidates: Iterable[Step], low: int, high: int, cuda: bool = False) -> int:
    """How many rounds fit into a time, judged by a second run of every candidate, between low and high."""
    steps = list(candidates)
    for step in steps:
        step()
    return max(low, min(high, int(seconds / sum(_time(step, cuda) for step in steps))))


def _time(step: Step, cuda: bool) -> float:
    gc.collect()
    gc.disable()
    try:
        if cuda:
            torch.cuda.synchronize()
        start = perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        return perf_counter() - start
    finally:
        gc.enable()


def summarise(times: Mapping[str, list[float]], reference: str, pairs: int, seed: int) -> Comparison:
    """Medians, ratios to the reference round by round, and their intervals."""
    base = times[reference]
    timings = {}
    for name, own in times.items():
        ratios = [mine / theirs for mine, theirs in zip(own, base, strict=True)]
        low, high = bootstrap(ratios, seed)
        timings[name] = Timing(median(own), median(ratios), low, high, tuple(own))
    return Comparison(timings, reference, pairs, seed)


def bootstrap(values: list[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the median; of one value, or of equal ones, that value."""
    if len(set(values)) < 2:
        return values[0], values[0]
    found = stats.bootstrap((values,), np.median, method="percentile", rng=np.random.default_rng(seed))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
