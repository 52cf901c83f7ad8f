"""Which rows train, which choose, and which are reported."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from datasets import ClassLabel

from adapterzoo.ablation.tasks.hf.columns import Part, as_text, check_columns, is_count
from adapterzoo.ablation.tasks.hf.files import Splits
from adapterzoo.ablation.tasks.hf.presets import PRESETS, TEST, TRAIN, VALIDATION, Preset
from adapterzoo.ablation.tasks.hf.sources import Source
from adapterzoo.errors import GridError, did_you_mean, listing
from adapterzoo.streams import stream

_VALIDATION_SHARE, _TEST_SHARE = 10, 5


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
    found = {as_text(value) for value in part.column(label)}
    if len(found) < 2:
        raise GridError(
            f"the column {label!r} has one value alone, {', '.join(found)!r}: there is nothing to tell apart"
        )
    return tuple(sorted(found, key=lambda text: (not is_count(text), int(text) if is_count(text) else 0, text)))


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
