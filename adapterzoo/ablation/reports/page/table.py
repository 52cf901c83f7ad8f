"""A table of the page: columns of text and of numbers, and what each is sorted by."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from adapterzoo.ablation.reports import texts


@dataclass(frozen=True)
class Entry:
    """One place of a table.

    Args:
        text: that is shown.
        key: that it is sorted by, if not the text; None comes last, whatever the order.
        kind: "number" (to the right), "tight" (in one line), "wide" (sentences) or "".
    """

    text: str
    key: float | str | None
    kind: str = ""


@dataclass(frozen=True)
class Column:
    """A column.

    Args:
        name: its header.
        entries: one a row.
        filtered: whether rows can be chosen by it.
    """

    name: str
    entries: Sequence[Entry]
    filtered: bool = False

    @property
    def number(self) -> bool:
        """Whether it holds numbers."""
        return any(entry.kind == "number" for entry in self.entries)


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Args:
        name: in its place's address.
        caption: what it shows.
        columns: all of one length.
    """

    name: str
    caption: str
    columns: Sequence[Column]

    @property
    def rows(self) -> list[tuple[Entry, ...]]:
        """The entries, row by row."""
        return list(zip(*(column.entries for column in self.columns), strict=True))


def words(name: str, values: Iterable[str], filtered: bool = False, kind: str = "") -> Column:
    """A column of text."""
    return Column(name, [Entry(value, None if value == "" else value, kind) for value in values], filtered)


def numbers(name: str, values: Iterable[tuple[str, float]]) -> Column:
    """A column of numbers: what is shown, and what it is sorted by."""
    return Column(name, [Entry("" if text == texts.NONE else text, _key(key), kind="number") for text, key in values])


def mixed(name: str, values: Iterable[Any]) -> Column:
    """An option: numbers sort as such."""
    entries = [
        Entry(f"{value:g}" if isinstance(value, float) else str(value), _key(value), kind="number")
        if value is not None and value == value
        else Entry("", None)
        for value in values
    ]
    return Column(name, entries)


def _key(value: Any) -> float | str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return value if math.isfinite(value) else None


def telling(columns: Iterable[Column]) -> list[Column]:
    """Columns without those that say nothing in any row."""
    return [column for column in columns if any(entry.text for entry in column.entries)]
