"""Data in files of this machine: which belong to which split, and how they are read."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from adapterzoo.ablation.tasks.hf.presets import COMMONSENSE, PRESETS, TRAIN, VALIDATION
from adapterzoo.ablation.tasks.hf.quiet import first_line
from adapterzoo.errors import GridError, did_you_mean, listing

Splits = Mapping[str, Dataset]

# What datasets calls the reader of each kind of file, and what it is told. Texts such as "NA" and "null" are texts.
_CSV: dict[str, Any] = {"keep_default_na": False}
_READERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "sep": "\t", "quoting": 3}),  # GLUE's own files quote nothing
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
_SHARD = re.compile(r"-\d+-of-\d+$")
_SAVED = ("dataset_dict.json", "dataset_info.json")
_CLONE = Path("ft-training_set"), Path("dataset")  # where a clone of LLM-Adapters has them


def existing(root: Path, name: str) -> Path:
    """A folder below another.

    Raises:
        GridError: either is not there; names the nearest.
    """
    if not root.is_dir():
        raise GridError(f"data={str(root)!r} is no folder")
    if not (root / name).exists():
        there = sorted(path.name for path in root.iterdir())
        raise GridError(
            f"{root} holds no {name!r}; it holds {', '.join(there) or 'nothing'}{did_you_mean(name, there)}"
        )
    return root / name


def is_saved(place: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return any((place / name).exists() for name in _SAVED)


def read_saved(place: Path) -> Splits:
    """What `save_to_disk` wrote.

    Raises:
        GridError: it can't be read.
    """
    try:
        found = load_from_disk(str(place))
    except Exception as error:
        raise GridError(f"{place} can't be read as a saved data set ({first_line(error)})") from error
    return dict(found) if isinstance(found, DatasetDict) else {TRAIN: found}


def split_files(place: Path) -> dict[str, tuple[Path, ...]]:
    """The files of each split of a file or folder: train.csv, validation-00000-of-00002.parquet, ...

    Raises:
        GridError: none that can be read.
    """
    if place.is_file():
        _reader(place)
        return {TRAIN: (place,)}
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(place.iterdir()):
        if path.suffix in _READERS and path.is_file():
            found[_split_name(path)].append(path)
    if not found:
        raise GridError(f"{place} holds no {', '.join(_READERS)} file, and no data set saved by save_to_disk")
    return {name: tuple(paths) for name, paths in found.items()}


def commonsense_files(place: Path) -> dict[str, tuple[Path, ...]]:
    """The files of the commonsense data, in the folder itself or where a clone of LLM-Adapters has them.

    Raises:
        GridError: those that are missing.
    """
    wanted = {TRAIN: Path("commonsense_170k.json")}
    wanted |= {name: Path(name) / "test.json" for name in PRESETS[COMMONSENSE].tests}
    found = {}
    for name, path in wanted.items():
        folder = _CLONE[0] if name == TRAIN else _CLONE[1]
        found[name] = next((here for here in (place / path, place / folder / path) if here.is_file()), None)
    missing = [str(wanted[name]) for name, path in found.items() if path is None]
    if missing:
        raise GridError(f"{place} lacks files of the commonsense data:{listing(missing)}")
    return {name: (path,) for name, path in found.items() if path is not None}


def _reader(path: Path) -> tuple[str, dict[str, Any]]:
    if path.suffix not in _READERS:
        raise GridError(f"{path} has none of the endings {', '.join(_READERS)}")
    return _READERS[path.suffix]


def read_files(paths: tuple[Path, ...]) -> Dataset:
    """The rows of a split.

    Raises:
        GridError: files of two kinds, or that can't be read.
    """
    if len({path.suffix for path in paths}) > 1:
        raise GridError(f"{', '.join(map(str, paths))} are one split in files of two kinds; keep one of them")
    reader, told = _reader(paths[0])
    with tempfile.TemporaryDirectory() as cache_dir:
        try:
            return load_dataset(
                reader, data_files=list(map(str, paths)), split=TRAIN, cache_dir=cache_dir, keep_in_memory=True, **told
            )
        except Exception as error:
            cause = error.__cause__ or error  # datasets says "an error occurred", and why in the cause
            raise GridError(f"{', '.join(map(str, paths))} can't be read ({first_line(cause)})") from error


def _split_name(path: Path) -> str:
    """The split that a file belongs to; GLUE's own files say dev for validation."""
    name = _SHARD.sub("", path.stem)
    return re.sub(r"^(dev|valid|val)(?=$|_)", VALIDATION, name)
