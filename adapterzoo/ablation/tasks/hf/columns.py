"""What the columns of a part hold: texts, classes, numbers; and what is wrong with them, row by row."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import Dataset

from adapterzoo.errors import GridError, did_you_mean, listing


class Part(NamedTuple):
    """Rows of one part, and their names, which are the same in every run.

    Args:
        rows: a column for each name.
        names: of the rows: the split and the number in it.
    """

    rows: Dataset
    names: tuple[str, ...]

    def column(self, name: str) -> list[Any]:
        """The values of a column."""
        return list(self.rows[name])

    def pick(self, chosen: Sequence[int]) -> "Part":
        """Those rows, in that order."""
        return Part(self.rows.select(list(chosen)), tuple(self.names[index] for index in chosen))


def check_columns(part: Part, wanted: Sequence[str]) -> None:
    """See that columns are there.

    Raises:
        GridError: those that are not, with the nearest.
    """
    there = part.rows.column_names
    missing = [name for name in wanted if name not in there]
    if missing:
        lines = [f"{name!r}{did_you_mean(name, there)}" for name in missing]
        raise GridError(f"the data have no column:{listing(lines)}\n  they have {', '.join(map(repr, there))}")


def class_numbers(part: Part, label: str, names: Sequence[str]) -> list[int]:
    """The class of each row: by its name, or by its number where the column holds numbers.

    Raises:
        GridError: labels that are no class, each with the nearest.
    """
    numbers = {name: index for index, name in enumerate(names)}
    by_number = {str(index): index for index in range(len(names))}
    known = numbers if all(is_count(name) for name in names) else {**by_number, **numbers}
    found = [known.get(as_text(value)) for value in part.column(label)]
    wrong = sorted({as_text(value) for value, index in zip(part.column(label), found, strict=True) if index is None})
    if wrong:
        hidden = "; -1 stands for a label that is hidden: GLUE's test sets have no others" if "-1" in wrong else ""
        lines = [f"{text!r}{did_you_mean(text, names)}" for text in wrong]
        raise GridError(f"labels in {label!r} that are none of {', '.join(names)}{hidden}:{listing(lines)}")
    return [index for index in found if index is not None]


def numbers(part: Part, label: str) -> list[float]:
    """The numbers of a column.

    Raises:
        GridError: values that are no finite numbers.
    """
    found, wrong = [], []
    for name, value in zip(part.names, part.column(label), strict=True):
        try:
            found.append(float(value))
        except (TypeError, ValueError):
            wrong.append(f"{name}: {value!r}")
    wrong += [f"{name}: {value}" for name, value in zip(part.names, found, strict=False) if not _finite(value)]
    if wrong:
        raise GridError(f"{label!r} holds what is no number; regression needs numbers:{listing(wrong)}")
    return found


def texts(part: Part, column: str) -> list[str]:
    """The texts of a column.

    Raises:
        GridError: rows without a text.
    """
    values = part.column(column)
    wrong = [f"{name}: {value!r}" for name, value in zip(part.names, values, strict=True) if not isinstance(value, str)]
    if wrong:
        raise GridError(f"{column!r} holds what is no text:{listing(wrong)}")
    return values


def as_text(value: Any) -> str:
    """A label as text; a whole number is the same whether a file says 1 or 1.0."""
    return str(int(value)) if isinstance(value, int | float) and float(value).is_integer() else str(value)


def is_count(text: str) -> bool:
    """Whether a label is the number of a class."""
    return text.isdecimal()


def _finite(value: float) -> bool:
    return float("-inf") < value < float("inf")
