"""Tuning: which options are tried for every cell, at which points, and which point is chosen."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.stats import qmc

Number = int | float
Point = dict[str, Any]
"""Values of the tuned options by name."""


class Range(BaseModel):
    """Where an option is looked for: exactly one of the three.

    Args:
        log: lowest and highest, spaced evenly on a logarithmic scale.
        linear: lowest and highest, spaced evenly.
        values: these and no others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    log: tuple[float, float] | None = None
    linear: tuple[float, float] | None = None
    values: tuple[Any, ...] | None = None

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        given = [name for name in ("log", "linear", "values") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of log: [low, high], linear: [low, high] and values: [...]")
        if self.values is not None and (not self.values or len(set(map(str, self.values))) < len(self.values)):
            raise ValueError("values must be at least one, and different")
        low, high = self.log or self.linear or (0.0, 1.0)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"[{low:g}, {high:g}] is no range: the first must be smaller")
        if self.log and low <= 0:
            raise ValueError(f"a logarithmic range must be above zero, not [{low:g}, {high:g}]")
        return self

    def at(self, share: float) -> Any:
        """The value at a share of the range, from 0 to 1."""
        if self.values is not None:
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        low, high = self.log or self.linear or (0.0, 1.0)
        value = low * (high / low) ** share if self.log else low + (high - low) * share
        return float(f"{value:.6g}")  # six digits: the same text, so the same run, on every platform


class Tune(BaseModel):
    """The search that every cell makes: the same points for each, so the same budget, on seeds that are not reported.

    Args:
        options: ranges of options of the task, by name; in YAML they stand beside the rest: `lr: {log: [1e-4, 1e-2]}`.
        trials: how many points; not needed where all options have `values`.
        on: the part that points are chosen on; there is no other than "validation".
        seeds: of the tuning runs; the metric's mean over them counts.

    One option is spread evenly over its range, ends included; several are spread by a Latin hypercube, drawn once from
    a fixed seed; options with values alone are all combined. No trial looks at another, so they can run side by side.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    options: dict[str, Range]
    trials: Annotated[int, Field(ge=1)] | None = None
    on: Literal["validation"] = "validation"
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (1000,)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, given: Any) -> Any:
        """Options that stand beside trials and on are gathered; a bare list is its values."""
        if not isinstance(given, Mapping):
            return given
        own = {name: given[name] for name in ("trials", "on", "seeds") if name in given}
        rest = {name: value for name, value in given.items() if name not in own}
        options = rest["options"] if set(rest) == {"options"} and isinstance(rest["options"], Mapping) else rest
        return {
            **own,
            "options": {
                name: {"values": value} if isinstance(value, Sequence) and not isinstance(value, str) else value
                for name, value in options.items()
            },
        }

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.options:
            raise ValueError("name at least one option of the task, such as lr: {log: [1e-4, 1e-2]}")
        listed = [option.values for option in self.options.values()]
        combined = math.prod(len(values) for values in listed if values is not None)
        if all(values is not None for values in listed) and self.trials not in (None, combined):
            raise ValueError(f"trials: {self.trials}, but the values make {combined} points; leave `trials` out")
        if any(values is None for values in listed) and self.trials is None:
            raise ValueError("say how many trials: a range has no number of points of its own")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} has one twice")
        return self

    def points(self) -> list[Point]:
        """The points that every cell tries.

        Example:
            >>> Tune.model_validate({"lr": {"log": [1e-4, 1e-2]}, "trials": 3}).points()
            [{'lr': 0.0001}, {'lr': 0.001}, {'lr': 0.01}]
        """
        names, ranges = list(self.options), list(self.options.values())
        if self.trials is None or all(option.values is not None for option in ranges):
            found = product(*(option.values or () for option in ranges))
            return [dict(zip(names, values, strict=True)) for values in found]
        shares = _spread(self.trials, len(names))
        return [{name: option.at(x) for name, option, x in zip(names, ranges, row, strict=True)} for row in shares]

    def edges(self, point: Point) -> dict[str, str]:
        """At which end of its points each option lies, "min" or "max"; those in between are left out."""
        found = {}
        for name in self.options:
            tried = sorted({p[name] for p in self.points() if isinstance(p[name], Number)})
            if len(tried) > 1 and point[name] in (tried[0], tried[-1]):
                found[name] = "min" if point[name] == tried[0] else "max"
        return found


def _spread(trials: int, options: int) -> list[list[float]]:
    if options == 1:
        return [[0.5]] if trials == 1 else [[float(x)] for x in np.linspace(0, 1, trials)]
    drawn: list[list[float]] = qmc.LatinHypercube(options, rng=0, optimization="random-cd").random(trials).tolist()
    return drawn


def best(
    points: Sequence[Point], found: Sequence[Mapping[str, float] | None], metric: str, maximise: bool
) -> int | None:
    """Which point has the best metric: its index; ties go to the lower loss, then to the earlier point; None if none.

    Args:
        points: that were tried.
        found: the mean validation metrics of each; None where a run failed.
        metric: such as "accuracy".
        maximise: whether larger is better.
    """
    sign = -1 if maximise else 1
    ranked = []
    for index, values in enumerate(found[: len(points)]):
        value = math.nan if values is None else values.get(f"validation/{metric}", math.nan)
        if values is not None and math.isfinite(value):
            ranked.append((sign * value, values.get("validation/loss", math.inf), index))
    return min(ranked)[2] if ranked else None
