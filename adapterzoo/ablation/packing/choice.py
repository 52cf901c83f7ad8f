"""Which way packed runs are computed, measured on their own first steps."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from statistics import median
from typing import Any, Literal

Wish = Literal["auto", "packed", "apart"]
APART_FIRST = 2  # steps at the start that are taken apart: what a step keeps in memory is counted in the second
ROUNDS = 3


class Way(Enum):
    """How the losses and gradients of several runs are computed in a step."""

    STACKED = "stacked"
    SLICED = "sliced"
    APART = "apart"


PACKED = (Way.STACKED, Way.SLICED)


@dataclass(frozen=True)
class Choice:
    """Which way was taken, and why: what the environment record of a run keeps.

    Args:
        runs: how many runs were side by side.
        way: "stacked" (one base, adapters of one composition computed together), "sliced" (one base, each adapter by
            itself) or "apart" (each run by itself, in turns).
        why: a sentence.
        ms: median milliseconds of forward and backward of all runs in a step, by way; of the ways that were timed.
        refused: why ways could not be taken, by way.
    """

    runs: int
    way: str
    why: str
    ms: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


class Chooser:
    """Says for every step which way to take, and learns from how long it took.

    The first two steps are apart. With "auto", packed and apart then take turns, three steps each (the first packed
    one, which is checked against the others, does not count), and the faster by the median is kept.

    Args:
        wish: "packed" or "apart" settle it beforehand, where packed is possible.
    """

    def __init__(self, wish: Wish) -> None:
        self._wish = wish
        self._seconds: dict[Way, list[float]] = defaultdict(list)
        self._refused: dict[Way, str] = {}
        self._refused_at: dict[Way, int] = {}
        self._steps = 0
        self._settled = Way.APART if wish == "apart" else None

    def next(self) -> Way:
        """The way of the next step."""
        self._steps += 1
        packed = self._packed
        if self._steps <= APART_FIRST or packed is None:
            return Way.APART
        if self._settled is not None:
            return self._settled
        if self._wish == "packed":
            return packed
        return packed if len(self._seconds[packed]) <= len(self._seconds[Way.APART]) else Way.APART

    def instead(self) -> Way:
        """The way to take where one was refused in the middle of a step."""
        return self._packed or Way.APART

    def took(self, way: Way, seconds: float) -> None:
        """A step that was neither checked nor counted took so long."""
        if self._steps <= APART_FIRST:
            return
        self._seconds[way].append(seconds)
        packed = self._packed
        if packed and self._settled is None and min(len(self._seconds[w]) for w in (packed, Way.APART)) >= ROUNDS:
            self._settled = min((packed, Way.APART), key=lambda each: median(self._seconds[each]))

    def refuse(self, way: Way, why: str) -> None:
        """A way can't be taken, for good."""
        self._refused[way] = why
        self._refused_at[way] = self._steps

    def allow_again(self) -> None:
        """What was refused in this step was no fault of the way."""
        for way in [way for way, step in self._refused_at.items() if step == self._steps]:
            del self._refused[way], self._refused_at[way]

    def choice(self, runs: int) -> Choice:
        """What stands now."""
        ms = {way.value: 1000 * median(times) for way, times in self._seconds.items() if times}
        refused = {way.value: why for way, why in self._refused.items()}
        way = Way.APART if self._packed is None else self._settled or self._packed
        return Choice(runs, way.value, self._why(ms), ms, refused)

    @property
    def _packed(self) -> Way | None:
        return next((way for way in PACKED if way not in self._refused), None)

    def _why(self, ms: Mapping[str, float]) -> str:
        if self._packed is None:
            return f"runs can't be packed: {self._refused[Way.SLICED]}"
        if self._wish != "auto":
            return "asked for"
        if self._settled is None:
            return "too few steps to measure"
        return f"the faster of {', '.join(f'{way} {time:.3g} ms' for way, time in ms.items())}"
