"""Figures beside what they are held to, as a table and as JSON."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.paired import Comparison

STYLES = {"pass": "green", "miss": "red", "pass, unsure": "yellow", "miss, unsure": "yellow", "": ""}


@dataclass(frozen=True)
class Figure:
    """One number that was had, and the reach it is held to, if any: not above it.

    Attributes:
        name: whose number it is.
        measure: what it is, with its unit.
        value: the number.
        reach: what it must not exceed; None where nothing is promised.
        low, high: a 95 % interval, where there is one.
        note: what else belongs to it, such as the time behind a ratio.
    """

    name: str
    measure: str
    value: float
    reach: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Pass or miss by the value; unsure where the interval has the reach inside. Empty without a reach."""
        if self.reach is None:
            return ""
        unsure = self.low is not None and self.high is not None and self.low <= self.reach < self.high
        return ("pass" if self.value <= self.reach else "miss") + (", unsure" if unsure else "")


@dataclass
class Result:
    """What one claim's script found.

    Attributes:
        claim: the script's name.
        sentence: what is claimed, in words.
        settings: sizes, ranks, numbers of rounds.
        held: whether the figures are held to their reach; not at other sizes than the claim's.
        figures: the numbers, in the order in which they are shown.
    """

    claim: str
    sentence: str
    settings: dict[str, object]
    held: bool = True
    figures: list[Figure] = field(default_factory=list)

    def add(self, name: str, measure: str, value: float, reach: float | None = None, note: str = "") -> None:
        """One counted figure."""
        reach = reach if self.held else None
        self.figures.append(Figure(name, measure, value, reach, note=note))

    def add_times(
        self,
        found: Comparison,
        measure: str,
        reaches: Mapping[str, float] | None = None,
        chosen: Callable[[str], bool] = lambda name: True,
    ) -> None:
        """The ratio to the reference, with its interval, and the time as a note: of every candidate, or the chosen."""
        for name, timing in found.timings.items():
            if not chosen(name):
                continue
            reach = (reaches or {}).get(name) if self.held else None
            note = f"{1000 * timing.seconds:.4g} ms, {found.pairs} pairs"
            self.figures.append(Figure(name, measure, timing.ratio, reach, timing.low, timing.high, note))

    def add_bytes(
        self, found: Mapping[str, Mapping[str, int]], reference: str, reaches: Mapping[str, float] | None = None
    ) -> None:
        """Ratios to the reference's bytes, for every way of counting; the reaches are held by each of them."""
        for way in found[reference]:
            for name, counts in found.items():
                reach, note = (reaches or {}).get(name), f"{counts[way] / 2**20:.1f} MiB"
                self.add(name, f"bytes {way} / {reference}'s", counts[way] / found[reference][way], reach, note)

    @property
    def misses(self) -> list[Figure]:
        """The figures above their reach."""
        return [figure for figure in self.figures if figure.verdict.startswith("miss")]

    def write(self, path: Path, machine: Mapping[str, object], seconds: float) -> None:
        """The result, the machine and how long it took, as JSON."""
        figures = [{**asdict(figure), "verdict": figure.verdict} for figure in self.figures]
        content = {
            "claim": self.claim, "sentence": self.sentence, "settings": self.settings, "machine": machine,
            "seconds": round(seconds, 1), "misses": len(self.misses), "figures": figures,
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def show(self, console: Console) -> None:
        """One table for each measure, and how many figures were within reach."""
        console.print(f"\n[bold]{self.claim}[/bold]: {self.sentence}", highlight=False)
        console.print(", ".join(f"{key} {value}" for key, value in self.settings.items()), style="dim", markup=False)
        for measure in dict.fromkeys(figure.measure for figure in self.figures):
            console.print(_table(measure, [figure for figure in self.figures if figure.measure == measure]))
        held = sum(figure.reach is not None for figure in self.figures)
        if not self.held:
            console.print("other sizes than the claim's: nothing is held to a reach", style="yellow")
        elif held:
            console.print(f"{held - len(self.misses)} of {held} figures within reach", style="bold", highlight=False)


def _table(measure: str, figures: list[Figure]) -> Table:
    columns: dict[str, list[str]] = {
        "name": [figure.name for figure in figures],
        "had": [_number(figure.value) for figure in figures],
        "95 % interval": ["" if figure.low is None else f"{figure.low:.4f} to {figure.high:.4f}" for figure in figures],
        "reach": ["" if figure.reach is None else f"≤ {figure.reach:g}" for figure in figures],
        "verdict": [f"[{STYLES[figure.verdict]}]{figure.verdict}" if figure.verdict else "" for figure in figures],
        "note": [figure.note for figure in figures],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table(*columns, title=measure, title_justify="left", min_width=min(len(measure), 100))
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:#.5g}"
