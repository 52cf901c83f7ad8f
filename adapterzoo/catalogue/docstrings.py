"""What a docstring says of a piece: what it is, its equation, and the sections that every piece has."""

import inspect
import re
from collections.abc import Mapping
from typing import NamedTuple

_LAST_POINT = re.compile(r"(?<![.])[.:]$")
_HEADING = re.compile(r"^([A-Z][a-z]+):$", re.MULTILINE)


class Said(NamedTuple):
    """A docstring in parts."""

    what: str
    """What it is, in a few words; the whole first paragraph if it holds no equation after a colon."""
    equation: str
    """The equation of the first paragraph, "" if there is none."""
    further: tuple[str, ...]
    """Other paragraphs of the head that hold an equation."""
    sections: Mapping[str, str]
    """The sections by their headings: Shapes, Args, Source, Deviations, ..."""


def said(documented: object) -> Said:
    """Read the docstring of a piece's class, or of a composition's function; all parts are empty without one."""
    text = inspect.cleandoc(documented.__doc__ or "")
    head, *rest = _HEADING.split(text)
    first, *others = [_unwrapped(paragraph) for paragraph in head.strip().split("\n\n")]
    what, equation = _split(first)
    further = tuple(paragraph for paragraph in others if "=" in paragraph)
    sections = {heading: inspect.cleandoc(body) for heading, body in zip(rest[::2], rest[1::2], strict=True)}
    return Said(what, equation, further, {heading: _unwrapped(body) for heading, body in sections.items()})


def _split(paragraph: str) -> tuple[str, str]:
    """Low-rank adaptation: ΔW = s · B A. -> (Low-rank adaptation, ΔW = s · B A)."""
    whole = _LAST_POINT.sub("", paragraph)
    what, _, equation = whole.partition(": ")
    if "=" in equation and "=" not in what:
        return what, equation
    return ("", whole) if "=" in whole else (whole, "")


def _unwrapped(paragraph: str) -> str:
    """Lines of one paragraph as one; indented lines stay lines of their own."""
    return re.sub(r"\n(?=\S)", " ", paragraph.rstrip())
