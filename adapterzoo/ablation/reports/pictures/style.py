"""How pictures look: one colour, line and marker a wrapper, one marker a generator, the same in every picture."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import cycle, islice, starmap
from textwrap import fill
from typing import Any, NamedTuple, ParamSpec, TypeVar
from warnings import catch_warnings, filterwarnings

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

P = ParamSpec("P")
T = TypeVar("T")

INK = "#101418"
"""Colour of text, axes and the bare generator: the page puts the reader's own text colour in its place."""
PAPER = "#fefefe"
"""Inside of hollow marks: the page puts its own ground in its place."""
GREY = "#7f868d"
# The colours of Okabe and Ito, told apart with every common colour blindness; line styles say it once more. Their
# yellow is left out: it can't be seen on white.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("--", "-.", ":", "-", (0, (6, 2)), (0, (1, 1)), (0, (4, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
_REFERENCES = ((0, (1, 1)), (0, (5, 1)), (0, (3, 1, 1, 1)))
SMALL = 7.5
ACROSS = 3
"""Axes side by side."""
_RC: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 9, "figure.titlesize": 10, "legend.fontsize": 8, "legend.frameon": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.facecolor": "none",
    "lines.linewidth": 1.6, "grid.color": INK, "grid.alpha": 0.12, "text.parse_math": False,
    # Text stays text: it can be searched and copied, and the file is small. A salt makes files the same every time.
    "svg.fonttype": "none", "svg.hashsalt": "adapterzoo",
    # Without hinting text is as wide in every resolution as in the one that is laid out.
    "text.hinting": "no_hinting",
}  # fmt: skip


class Look(NamedTuple):
    """Colour and line of a wrapper."""

    colour: str
    dash: Any
    """As matplotlib takes it: "--", or lengths of strokes and gaps."""


@contextmanager
def styled() -> Iterator[None]:
    """The style, while figures are made and saved."""
    with rc_context(_RC), catch_warnings():
        filterwarnings("ignore", message="Glyph")  # labels are in any script; what the font lacks becomes a box
        yield


def in_style(make: Callable[P, T]) -> Callable[P, T]:
    """A function that makes a figure, in the style."""

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        with styled():
            return make(*args, **kwargs)

    return made


def looks(wrappers: Sequence[str], bare: str) -> dict[str, Look]:
    """How each wrapper looks; the bare generator is the ink."""
    others = [wrapper for wrapper in wrappers if wrapper != bare]
    found = zip(others, starmap(Look, zip(cycle(COLOURS), cycle(DASHES), strict=False)), strict=False)
    return {bare: Look(INK, "-"), **dict(found)}


def reference_looks(cells: Iterable[str]) -> dict[str, Look]:
    """How each reference looks: grey, by its dashes."""
    return {cell: Look(GREY, dash) for cell, dash in zip(cells, cycle(_REFERENCES), strict=False)}


def markers(generators: Sequence[str]) -> dict[str, str]:
    """How each generator is marked."""
    return dict(zip(generators, islice(cycle(MARKERS), len(generators)), strict=True))


def small_multiples(number: int, width: float = 3.1, height: float = 2.5) -> tuple[Figure, list[Axes]]:
    """A figure of several axes that share their y, at most three side by side.

    Args:
        number: of axes; at least 1.
        width: of each, in inches.
        height: of each.
    """
    across = min(number, ACROSS)
    down = -(-number // across)
    figure = Figure(figsize=(max(4.2, width * across), height * down + 0.9), layout="constrained")
    every = list(figure.subplots(down, across, sharey=True, squeeze=False).flat)
    for axes in every[number:]:
        axes.set_axis_off()
    for axes in every[:number]:
        axes.grid()
    return figure, every[:number]


def handle(colour: str, **how: Any) -> Line2D:
    """What stands in a legend: a line, or a marker where `how` says so."""
    return Line2D([], [], color=colour, **how)


def lines_of(looks: Iterable[tuple[str, Look]]) -> list[tuple[str, Line2D]]:
    """Entries of a legend for lines."""
    return [(label, handle(look.colour, linestyle=look.dash)) for label, look in looks]


def below(figure: Figure, entries: Sequence[tuple[str, Line2D]]) -> None:
    """A legend below all axes, of as many columns as fit."""
    if not entries:
        return
    longest = max(len(short(label, 40)) for label, _ in entries)
    columns = max(1, int(figure.get_figwidth() / (0.6 + 0.065 * longest)))
    figure.legend(
        [handle for _, handle in entries],
        [short(label, 40) for label, _ in entries],
        loc="outside lower center",
        ncols=min(columns, len(entries)),
    )


def beside(axes: Axes, y: float, text: str, where: Any, **how: Any) -> None:
    """Text to the right of an axes; its distance is in points, so that the layout knows how wide it is."""
    axes.annotate(
        text, (1.0, y), xycoords=where, xytext=(8, 0), textcoords="offset points", annotation_clip=False, **how
    )


def headline(figure: Figure, text: str) -> None:
    """A title above all axes, in as many lines as it takes."""
    figure.suptitle(fill(short(text, 160), int(13 * figure.get_figwidth())))


def short(text: str, most: int = 30) -> str:
    """A label that fits, without what no font can show.

    Example:
        >>> short("MAP(LoRA(r=2))"), short("x" * 40, 10)
        ('MAP(LoRA(r=2))', 'xxxxxxxxx…')
    """
    plain = "".join(character if character.isprintable() else " " for character in text)
    return plain if len(plain) <= most else plain[: most - 1] + "…"


def plain_ticks(axes: Axes) -> None:
    """Plain numbers along x, for a logarithmic scale."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def slug(*parts: str) -> str:
    """A file's name.

    Example:
        >>> slug("heat map", "dataset=mnli, r=2"), slug("forest", "")
        ('heat_map_dataset-mnli_r-2', 'forest')
    """
    words = [re.sub(r"[^a-zA-Z0-9.-]+", "_", part.replace("=", "-")).strip("_.-") for part in parts]
    return "_".join(filter(None, words))[:80]
