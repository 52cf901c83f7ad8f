"""Where data are: a name on the hub, a file or folder of this machine, or a data set that needs neither."""

import hashlib
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from datasets import (
    ClassLabel,
    Dataset,
    DatasetBuilder,
    DatasetDict,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)

from adapterzoo.ablation.tasks.hf import builtin
from adapterzoo.ablation.tasks.hf.presets import BUILT_IN, COMMONSENSE, PRESETS, TRAIN, VALIDATION
from adapterzoo.ablation.tasks.hf.quiet import first_line, quiet
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


@dataclass(frozen=True)
class Source:
    """A data set by where it is.

    Args:
        dataset: a preset's name, a name on the hub, or a file or folder.
        subset: which configuration of a hub's data set.
        data: folder that holds a folder for each preset; "" for the hub.

    Raises:
        GridError: from its methods: nothing there, a file that can't be read, a hub that can't be reached.
    """

    dataset: str
    subset: str = ""
    data: str = ""

    def place(self) -> Path | None:
        """The file or folder; None if there is none, and the hub is asked."""
        if self.dataset in BUILT_IN:
            return None
        if self.data:
            return _existing(Path(self.data).expanduser(), "" if self.dataset == COMMONSENSE else self.dataset)
        if self.dataset == COMMONSENSE:
            raise GridError(
                "the commonsense data are not on the hub under one name: give data=FOLDER, with commonsense_170k.json "
                "and boolq/test.json, piqa/test.json, ... in it, such as a clone of LLM-Adapters"
            )
        path = Path(self.dataset).expanduser()
        return path if self.dataset not in PRESETS and path.exists() else None

    def splits(self) -> Splits:
        """Every split, by name."""
        place = self.place()
        with quiet():
            if self.dataset in BUILT_IN:
                return {name: Dataset.from_list(rows) for name, rows in builtin.rows(self.dataset).items()}
            if place is None:
                return self._from_hub()
            if any((place / name).exists() for name in _SAVED):
                return _saved(place)
            return {name: _read(paths) for name, paths in self.files(place).items()}

    def files(self, place: Path) -> dict[str, tuple[Path, ...]]:
        """The files of each split of a file or folder: train.csv, validation-00000-of-00002.parquet, ..."""
        if self.dataset == COMMONSENSE:
            return _commonsense_files(place)
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

    def fingerprint(self) -> str:
        """A hash of all the files; for a name on the hub, the one that datasets gives to its version."""
        if self.dataset in BUILT_IN:
            return builtin.digest()
        place = self.place()
        if place is None:
            return str(self._builder().hash)
        if self.dataset == COMMONSENSE:
            return digest_of_files([path for paths in self.files(place).values() for path in paths])
        return digest_of_files([place] if place.is_file() else _files_below(place))

    def on_hub(self) -> bool:
        """Whether the data have to be had from the hub."""
        return self.dataset not in BUILT_IN and self.place() is None

    def declared_classes(self, label: str) -> tuple[str, ...]:
        """The classes that a data set on the hub declares, without a download of its rows."""
        features = self._builder().info.features or {}
        declared = features.get(label)
        if not isinstance(declared, ClassLabel):
            known = ", ".join(map(repr, features)) or "no columns"
            raise GridError(
                f"the data set {self.dataset!r} declares no classes in {label!r} (it declares {known}): give their "
                f"names, in their order: labels=[...]{did_you_mean(label, features)}"
            )
        return tuple(declared.names)

    def _hub(self) -> tuple[str, str | None]:
        preset = PRESETS.get(self.dataset)
        return (preset.hub, self.dataset) if preset else (self.dataset, self.subset or None)

    def _from_hub(self) -> Splits:
        name, subset = self._hub()
        try:
            found = load_dataset(name, subset)
        except Exception as error:  # datasets raises a dozen kinds; what they say is passed on
            raise self._unreachable(error) from error
        return dict(found)

    def _builder(self) -> DatasetBuilder:
        found = _hub_builder(*self._hub())
        if isinstance(found, Exception):
            raise self._unreachable(found) from found
        return found

    def _unreachable(self, error: Exception) -> GridError:
        name, subset = self._hub()
        nearest = "" if self.dataset in PRESETS else did_you_mean(self.dataset, PRESETS)
        folder = f"{self.dataset}/" if self.dataset in PRESETS else ""
        option = "data=FOLDER" if folder else "dataset=FOLDER"
        return GridError(
            f"the data set {name!r}{f' ({subset})' if subset else ''} can't be had from the hub ({first_line(error)})"
            f"{nearest}; or put its files on this machine and say {option}, with FOLDER/{folder}train.parquet, "
            f"FOLDER/{folder}validation.parquet, ... (csv, tsv, json and jsonl do too)"
        )


@cache  # without a network each try takes half a minute, and every cell of a grid asks
def _hub_builder(name: str, subset: str | None) -> DatasetBuilder | Exception:
    try:
        with quiet():
            return load_dataset_builder(name, subset)
    except Exception as error:
        return error


def digest_of_files(paths: list[Path]) -> str:
    """A short hash of files' names and content."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + _file_digest(path, *_stamp(path)))
    return digest.hexdigest()[:12]


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@cache  # weights are gigabytes, and every cell of a grid asks
def _file_digest(path: Path, size: int, changed: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _existing(root: Path, name: str) -> Path:
    if not root.is_dir():
        raise GridError(f"data={str(root)!r} is no folder")
    if not (root / name).exists():
        there = sorted(path.name for path in root.iterdir())
        raise GridError(
            f"{root} holds no {name!r}; it holds {', '.join(there) or 'nothing'}{did_you_mean(name, there)}"
        )
    return root / name


def _files_below(place: Path) -> list[Path]:
    """Every file of a folder, but for hidden ones."""
    return sorted(
        path
        for path in place.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(place).parts)
    )


def _split_name(path: Path) -> str:
    """The split that a file belongs to; GLUE's own files say dev for validation."""
    name = _SHARD.sub("", path.stem)
    return re.sub(r"^(dev|valid|val)(?=$|_)", VALIDATION, name)


def _commonsense_files(place: Path) -> dict[str, tuple[Path, ...]]:
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


def _saved(place: Path) -> Splits:
    try:
        found = load_from_disk(str(place))
    except Exception as error:
        raise GridError(f"{place} can't be read as a saved data set ({first_line(error)})") from error
    return dict(found) if isinstance(found, DatasetDict) else {TRAIN: found}


def _reader(path: Path) -> tuple[str, dict[str, Any]]:
    if path.suffix not in _READERS:
        raise GridError(f"{path} has none of the endings {', '.join(_READERS)}")
    return _READERS[path.suffix]


def _read(paths: tuple[Path, ...]) -> Dataset:
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
