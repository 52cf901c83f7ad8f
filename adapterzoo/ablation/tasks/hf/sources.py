"""Where data are: a name on the hub, a file or folder of this machine, or a data set that needs neither."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetBuilder, load_dataset, load_dataset_builder

from adapterzoo.ablation.tasks.hf import builtin
from adapterzoo.ablation.tasks.hf.digests import digest_of_files, files_below
from adapterzoo.ablation.tasks.hf.files import (
    Splits,
    commonsense_files,
    existing,
    is_saved,
    read_files,
    read_saved,
    split_files,
)
from adapterzoo.ablation.tasks.hf.presets import BUILT_IN, COMMONSENSE, PRESETS
from adapterzoo.ablation.tasks.hf.quiet import first_line, quiet
from adapterzoo.errors import GridError, did_you_mean


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
            return existing(Path(self.data).expanduser(), "" if self.dataset == COMMONSENSE else self.dataset)
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
            if is_saved(place):
                return read_saved(place)
            return {name: read_files(paths) for name, paths in self._files(place).items()}

    def _files(self, place: Path) -> dict[str, tuple[Path, ...]]:
        return commonsense_files(place) if self.dataset == COMMONSENSE else split_files(place)

    def fingerprint(self) -> str:
        """A hash of all the files; for a name on the hub, the one that datasets gives to its version."""
        if self.dataset in BUILT_IN:
            return builtin.digest()
        place = self.place()
        if place is None:
            return str(self._builder().hash)
        if self.dataset == COMMONSENSE:
            return digest_of_files([path for paths in self._files(place).values() for path in paths])
        return digest_of_files([place] if place.is_file() else files_below(place))

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
