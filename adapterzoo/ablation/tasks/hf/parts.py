"""Which rows train, which choose, and which are reported; and what their columns hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from datasets import ClassLabel, Dataset

from adapterzoo.ablation.tasks.hf.presets import PRESETS, TEST, TRAIN, VALIDATION, Preset
from adapterzoo.ablation.tasks.hf.sources import Source, Splits
from adapterzoo.errors import GridError, did_you_mean, listing
from adapterzoo.streams import stream

_VALIDATION_SHARE, _TEST_SHARE = 10, 5


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


@dataclass(frozen=True)
class Parts:
    """The three parts; the test part may be of several sets.

    Args:
        train: for training.
        validation: for choosing: what is tuned, and when to stop.
        tests: for the report, by name; see `Preset.tests`.
    """

    train: Part
    validation: Part
    tests: Mapping[str, Part]

    def all(self) -> dict[str, Part]:
        """Every part, by a name of its own."""
        return {TRAIN: self.train, VALIDATION: self.validation, **{_test_name(n): p for n, p in self.tests.items()}}


def parts_of(source: Source, train: int | None, validation: int, test: int | None) -> Parts:
    """Deal the rows of a data set out.

    The test part is the published one that has labels: of GLUE its validation set; else the split "test", or
    "validation" where there is no test, or a fifth of the rows. The validation part is the split "validation" if that
    is not the test part, else split off the training rows: `validation` of them, at most a tenth. All draws are fixed:
    every seed has the same parts.

    Args:
        source: the data.
        train, validation, test: how many rows of each part are used; None: all.

    Raises:
        GridError: splits that are missing, or too few rows.
    """
    splits = source.splits()
    preset = PRESETS.get(source.dataset)
    trained, tests = _of_preset(splits, preset) if preset else _of_names(splits)
    if not tests:
        trained, off = _split_off(trained, max(1, len(trained.names) // _TEST_SHARE), TEST)
        tests = {"": off}
    if VALIDATION in splits and VALIDATION not in _names_of(preset, splits):
        chosen = _drawn(_whole(splits, VALIDATION), validation, VALIDATION)
    else:
        count = max(1, min(validation, len(trained.names) // _VALIDATION_SHARE))
        trained, chosen = _split_off(trained, count, VALIDATION)
    return Parts(
        _drawn(trained, train, TRAIN), chosen, {name: _drawn(part, test, TEST) for name, part in tests.items()}
    )


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


@cache  # every cell of a grid asks
def classes_of(source: Source, label: str) -> tuple[str, ...]:
    """The classes of a label, in their order: as the data declare them, else the values in the training rows, sorted.

    Raises:
        GridError: the column is not there, or has fewer than two values; or the hub says nothing of them.
    """
    if source.on_hub():
        return source.declared_classes(label)
    splits = source.splits()
    part = _whole(splits, TRAIN if TRAIN in splits else next(iter(splits)))
    check_columns(part, [label])
    declared = part.rows.features[label]
    if isinstance(declared, ClassLabel):
        return tuple(declared.names)
    found = {_as_text(value) for value in part.column(label)}
    if len(found) < 2:
        raise GridError(
            f"the column {label!r} has one value alone, {', '.join(found)!r}: there is nothing to tell apart"
        )
    return tuple(sorted(found, key=lambda text: (not _is_count(text), int(text) if _is_count(text) else 0, text)))


def class_numbers(part: Part, label: str, names: Sequence[str]) -> list[int]:
    """The class of each row: by its name, or by its number where the column holds numbers.

    Raises:
        GridError: labels that are no class, each with the nearest.
    """
    numbers = {name: index for index, name in enumerate(names)}
    by_number = {str(index): index for index in range(len(names))}
    known = numbers if all(_is_count(name) for name in names) else {**by_number, **numbers}
    found = [known.get(_as_text(value)) for value in part.column(label)]
    wrong = sorted({_as_text(value) for value, index in zip(part.column(label), found, strict=True) if index is None})
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


def _of_preset(splits: Splits, preset: Preset) -> tuple[Part, dict[str, Part]]:
    wanted = [preset.train, *preset.tests.values()]
    missing = [f"{name!r}{did_you_mean(name, splits)}" for name in wanted if name not in splits]
    if missing:
        raise GridError(f"the data lack splits:{listing(missing)}\n  they have {', '.join(map(repr, splits))}")
    return _whole(splits, preset.train), {name: _whole(splits, split) for name, split in preset.tests.items()}


def _of_names(splits: Splits) -> tuple[Part, dict[str, Part]]:
    if TRAIN not in splits and len(splits) > 1:
        raise GridError(f"none of the splits is called train: {', '.join(splits)}{did_you_mean(TRAIN, splits)}")
    trained = TRAIN if TRAIN in splits else next(iter(splits))
    tested = next((name for name in (TEST, VALIDATION) if name in splits and name != trained), None)
    return _whole(splits, trained), {"": _whole(splits, tested)} if tested else {}


def _names_of(preset: Preset | None, splits: Splits) -> set[str]:
    """Splits that are the test part."""
    if preset:
        return set(preset.tests.values())
    return {TEST} if TEST in splits else {VALIDATION}


def _whole(splits: Splits, name: str) -> Part:
    rows = splits[name]
    if not len(rows):
        raise GridError(f"the split {name!r} has no rows")
    return Part(rows, tuple(f"{name}/{number}" for number in range(len(rows))))


def _split_off(part: Part, count: int, key: str) -> tuple[Part, Part]:
    """The rest, and `count` rows that are drawn."""
    if len(part.names) <= count:
        raise GridError(f"{len(part.names)} rows are too few to split off a {key} part; give more, or a split of it")
    order = torch.randperm(len(part.names), generator=stream("hf", key)).tolist()
    return part.pick(sorted(order[count:])), part.pick(sorted(order[:count]))


def _drawn(part: Part, count: int | None, key: str) -> Part:
    if count is None or count >= len(part.names):
        return part
    order = torch.randperm(len(part.names), generator=stream("hf", "some", key)).tolist()
    return part.pick(sorted(order[:count]))


def _test_name(name: str) -> str:
    return f"{TEST}-{name}" if name else TEST


def _as_text(value: Any) -> str:
    """A label as text; a whole number is the same whether a file says 1 or 1.0."""
    return str(int(value)) if isinstance(value, int | float) and float(value).is_integer() else str(value)


def _is_count(text: str) -> bool:
    return text.isdecimal()


def _finite(value: float) -> bool:
    return float("-inf") < value < float("inf")
