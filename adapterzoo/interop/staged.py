"""Directories of files that take their place together: written beside, then moved."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from adapterzoo.errors import ExportError, TargetError, listing
from adapterzoo.layer import AdaptedLinear, adapted_layers
from adapterzoo.sharded import is_sharded, reshard, wrapper_of_processes

_WEIGHTS = re.compile(r"(?P<stem>.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class Stage:
    """Where files are written before they take their place.

    Args:
        files: what stands in it when all is done moves to the directory.
        scratch: what stands in it is thrown away.
    """

    files: Path
    scratch: Path


@contextmanager
def staged(directory: str | os.PathLike[str], last: str = "config.json") -> Iterator[Stage]:
    """Let files be written beside a directory, and move them into it when the body is done: all of them or none.

    What is moved replaces files of the same names, and weights in safetensors of another number of shards; all other
    files in the directory stay. A body or a move that fails leaves the directory as it was. Where the process is killed
    between two moves, the file `last` is missing, so what is there does not load.

    Args:
        directory: where the files belong; it is made if it is not there.
        last: the file that is taken away first and moved last.

    Raises:
        ExportError: the path is a file.
    """
    target = Path(directory).expanduser()
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file; give the directory that the files are to stand in")
    target.parent.mkdir(parents=True, exist_ok=True)
    # A directory that is there may be a link or a mount, into which nothing can be renamed from beside it.
    place = target if target.exists() else target.parent
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=place))
    try:
        stage = Stage(work / "files", work / "scratch")
        for path in (stage.files, stage.scratch):
            path.mkdir()
        yield stage
        _commit(stage.files, target, work / "replaced", last)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def whole_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers of a model that one process can write: whole, under its own names, with values.

    Raises:
        TargetError: no adapted layer.
        ExportError: a model in a wrapper, in shards, or on the meta device.
    """
    layers = adapted_layers(model)
    if not layers:
        raise TargetError(f"this {type(model).__name__} has no adapted layer; adapt(model, spec) makes them")
    wrapper = wrapper_of_processes(model)
    if wrapper is not None:
        raise ExportError(f"the model is in a {wrapper}, which has names of its own; give what it wraps (model.module)")
    refuse_problems(compiled_inside(model), "the model's names are not those of its plain form")
    reshard(model)
    values = dict([*model.named_parameters(), *model.named_buffers()])
    refuse_problems(
        [f"{name} is in shards over several processes" for name, value in values.items() if is_sharded(value)],
        "gather a full state dict (torch.distributed.checkpoint.state_dict), load it into a whole model, write that",
    )
    refuse_problems(
        [f"{name} is on the meta device" for name, value in values.items() if value.is_meta],
        "a model that holds no values can't be written",
    )
    return layers


def compiled_inside(model: nn.Module) -> list[str]:
    """Modules of a model that torch.compile stands around, which changes the names of what is in them."""
    names = [name.removesuffix("._orig_mod") for name, _ in model.named_modules() if name.endswith("._orig_mod")]
    return [f"{name} is wrapped by torch.compile; {name}.compile() compiles it in its place" for name in names]


def refuse_beside(directory: str | os.PathLike[str], names: Sequence[str], why: str) -> None:
    """Raise an ExportError if the directory holds one of these files.

    Args:
        directory: it may be missing.
        names: of files that would change what the new ones mean.
        why: what would happen, as the end of a sentence.
    """
    found = [name for name in names if (Path(directory).expanduser() / name).exists()]
    if found:
        raise ExportError(f"{directory} holds {', '.join(found)}: {why}; write to another directory")


def refuse_problems(problems: Sequence[str], what: str) -> None:
    """Raise an ExportError that lists all problems, if there is any."""
    if problems:
        raise ExportError(f"{what}:{listing(problems)}")


@dataclass
class _Moves:
    """Renames that can be taken back."""

    done: list[tuple[Path, Path]] = field(default_factory=list)

    def move(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
        self.done.append((source, target))

    def take_back(self) -> None:
        for source, target in reversed(self.done):
            target.replace(source)


def _commit(new: Path, target: Path, replaced: Path, last: str) -> None:
    found = (path.relative_to(new) for path in new.rglob("*") if path.is_file())
    files = sorted(found, key=lambda path: (str(path) == last, path))
    _share(new, files)
    for file in files:
        _flush(new / file)
    if not target.exists():
        new.rename(target)
        return
    old = [file for file in [*reversed(files), *_stale(files, target)] if (target / file).exists()]
    moves = _Moves()
    try:
        for file in old:
            moves.move(target / file, replaced / file)
        for file in files:
            moves.move(new / file, target / file)
    except BaseException:
        moves.take_back()
        raise


def _stale(files: Sequence[Path], target: Path) -> list[Path]:
    """Weights in the target under names of another sharding, which a loader might take for the new ones."""
    stems = {found["stem"] for file in files if (found := _WEIGHTS.fullmatch(str(file)))}
    beside = (Path(path.name) for path in target.iterdir() if path.is_file())
    return [
        path for path in beside if path not in files and (m := _WEIGHTS.fullmatch(path.name)) and m["stem"] in stems
    ]


def _share(new: Path, files: Sequence[Path]) -> None:
    """Give files the mode that new files have here: safetensors writes files that only their owner can read."""
    (new.parent / "mode").touch()
    for file in files:
        (new / file).chmod((new.parent / "mode").stat().st_mode)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
