"""A picture: a figure with its name, title and the text that stands for it."""

import re
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from adapterzoo.ablation.reports.pictures.style import INK, PAPER, styled

_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_PAD = 0.1  # inches left and right: a browser's own font may be a little wider
_PIXELS = 96 / 72  # a point of a figure in pixels of a page


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture.

    Args:
        name: of its files, without ending.
        section: of the page that it belongs to: "effects", "heat", "single", "fronts", "curves", "trajectories",
            "tuning".
        panel: that it shows, "" for all or where there are none.
        title: one line.
        alt: what can be read off it, for those who don't see it.
        figure: itself.
    """

    name: str
    section: str
    panel: str
    title: str
    alt: str
    figure: Figure

    def __post_init__(self) -> None:
        """Lay the figure out, once for all formats."""
        engine = self.figure.get_layout_engine()
        if isinstance(engine, ConstrainedLayoutEngine):
            engine.set(w_pad=_PAD)
            engine.execute(self.figure)
            engine.execute(self.figure)  # the first time may change which ticks there are
            self.figure.set_layout_engine("none")

    @property
    def width(self) -> int:
        """In pixels of a page."""
        return round(self.figure.get_figwidth() * 72 * _PIXELS)

    def save(self, path: Path) -> None:
        """Write it to a file; the ending says the format: .png or .svg. The same picture gives the same bytes."""
        with styled():
            plain = {"metadata": _METADATA} if path.suffix == ".svg" else {"metadata": {"Software": None}, "dpi": 150}
            self.figure.savefig(path, facecolor="white", **plain)

    def svg(self) -> str:
        """As an element of a page: without a background, in the colour of the text around it, no name used twice."""
        with styled():
            buffer = StringIO()
            self.figure.savefig(buffer, format="svg", transparent=True, metadata=_METADATA)
        return _element(buffer.getvalue(), self.name)


def _element(document: str, name: str) -> str:
    """The svg element of a document, made by matplotlib: labels in it are escaped.

    It loses what only a file of its own needs, and its names get those of the picture, since a page holds many.
    """
    text = document[document.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg)', r"\1\2", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1 aria-hidden=\"true\"", text, count=1)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    return re.sub(r"\s*\n\s*", "\n", text.replace(INK, "currentColor").replace(PAPER, "var(--ground)")).strip()
