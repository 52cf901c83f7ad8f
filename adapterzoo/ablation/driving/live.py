"""The live display of a grid: what runs, what is done, what failed, how long it takes, and the best so far."""

from collections import Counter, deque
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from adapterzoo.ablation.driving.estimate import duration, estimate
from adapterzoo.errors import count

_SHOWN = 8
_REMEMBERED = 200  # the last run times by role: enough for a median, and no more for the ten-thousandth run
_A_SECOND = 2


class Display:
    """Tells a person how a grid goes: a live table in a terminal, a line for each run elsewhere.

    Args:
        slots: how many runs there are at a time.
        console: where to; the standard output if None.
        maximise: whether more of the metric is better.
        percent: whether it is shown in per cent.

    Example:
        >>> import io
        >>> console = Console(file=io.StringIO(), width=100)
        >>> with Display(slots=2, console=console) as display:
        ...     display.expect(total=4, done_already=1)
        ...     display.ended("a", "LoRA(r=2), seed 0", "report", "done", 0.9, 12.0, None)
        >>> print(console.file.getvalue().strip())
        4 runs, 1 of them done before
        [2/4] LoRA(r=2), seed 0: done in 12 s, validation 90.0 %; about 12 s left
    """

    def __init__(
        self, slots: int, console: Console | None = None, *, maximise: bool = True, percent: bool = True
    ) -> None:
        self._console = console or Console()
        self._slots, self._sign, self._percent = slots, 1 if maximise else -1, percent
        self._stage, self._total, self._before = "", 0, 0
        self._status: Counter[str] = Counter()
        self._left: Counter[str] = Counter()
        self._running: dict[str, str] = {}
        self._seconds: dict[str, deque[float]] = {}
        self._best: tuple[float, str] | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._table, refresh_per_second=_A_SECOND)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """Say something once."""
        self._print(text)

    def stage(self, text: str) -> None:
        """Say what is being done."""
        if text != self._stage and self._live is None and text.startswith("preparing"):
            self._print(text)
        self._stage = text

    def expect(self, total: int, done_already: int) -> None:
        """Say how much there is.

        Args:
            total: runs of the grid.
            done_already: of them, found done.
        """
        self._total, self._before = total, done_already
        self._print(count(total, "run") + (f", {done_already:,} of them done before" if done_already else ""))

    def started(self, key: str, label: str, role: str) -> None:
        """A run was handed to the engine."""
        self._running[key] = label

    def ended(
        self, key: str, label: str, role: str, status: str, metric: float | None, seconds: float, problem: str | None
    ) -> None:
        """A run has ended.

        Args:
            key, label, role: of the run.
            status: "done" or "failed".
            metric: on the validation part.
            seconds: that it took.
            problem: why it failed.
        """
        self._running.pop(key, None)
        self._status[status] += 1
        if status == "done":
            self._seconds.setdefault(role, deque(maxlen=_REMEMBERED)).append(seconds)
            if metric is not None and (self._best is None or self._sign * metric > self._sign * self._best[0]):
                self._best = (metric, label)
        if status == "failed" or self._live is None:
            self._print(self._line(label, status, metric, seconds, problem), "red" if status == "failed" else None)

    def _line(self, label: str, status: str, metric: float | None, seconds: float, problem: str | None) -> str:
        if status == "failed":
            return f"[{self._ended}/{self._total}] failed: {label}: {problem}"
        shown = "" if metric is None else f", validation {self._shown(metric)}"
        tail = f"; about {duration(self._eta())} left" if self._ended < self._total else ""
        return f"[{self._ended}/{self._total}] {label}: done in {duration(seconds)}{shown}{tail}"

    @property
    def _ended(self) -> int:
        return self._before + self._status["done"] + self._status["failed"]

    def _eta(self) -> float | None:
        return estimate(self._seconds, {"any": max(0, self._total - self._ended)}, self._slots)

    def _shown(self, metric: float) -> str:
        return f"{100 * metric:.1f} %" if self._percent else f"{metric:.4g}"

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(Text(text, style=style or ""), soft_wrap=True)

    def _table(self) -> RenderableType:
        """What stands at the bottom of the terminal; as much work for ten thousand runs as for ten."""
        counts = Text(
            f"{self._stage or 'starting'}: {self._ended:,} of {self._total:,} runs, {len(self._running):,} running, "
            f"{self._status['failed']:,} failed, {self._before:,} done before; about {duration(self._eta())} left",
            overflow="ellipsis",
            no_wrap=True,
        )
        parts: list[RenderableType] = [ProgressBar(total=max(1, self._total), completed=self._ended), counts]
        if self._best is not None:
            best = f"best on validation so far: {self._shown(self._best[0])}, {self._best[1]}"
            parts.append(Text(best, style="green", overflow="ellipsis", no_wrap=True))
        running = Table.grid(padding=(0, 1))
        for label in list(self._running.values())[:_SHOWN]:
            running.add_row(Text(f"  {label}", style="dim", overflow="ellipsis", no_wrap=True))
        more = len(self._running) - _SHOWN
        return Group(*parts, running, *([Text(f"  and {more:,} more", style="dim")] if more > 0 else []))
