"""Files written so that a crash at any moment leaves the old ones whole, or the new ones."""

import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapterzoo.checkpoint.manifest import TENSOR_FILE, FileEntry

MANIFEST = "adapterzoo.json"
_HALF_WRITTEN = ".adapterzoo-*.tmp"


# Note [One commit point]
# Tensor files have the hash of what they hold in their names, so writing new ones never touches those that the
# description in place names. They are on the disk before the new description is, and that takes the place of the old
# one by one rename: before it the old save is whole, after it the new one. What no description names any more is
# removed last; a crash before that leaves files that nobody reads, and the next save removes them.
@dataclass(frozen=True)
class TensorFile:
    """A tensor file that was written: its name, its entry and the keys in it."""

    name: str
    entry: FileEntry
    keys: list[str]


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], most: int) -> list[TensorFile]:
    """Write tensors into files named by their content.

    Args:
        directory: where.
        tensors: whole tensors, by key.
        most: the most bytes of tensors in a file; a larger tensor gets a file of its own.
    """
    groups = _groups(tensors, most)
    stage = _fresh(directory)
    stage.mkdir()
    try:
        paths = [stage / f"{i}" for i in range(len(groups))]
        entries = [
            _written(path, {key: tensors[key] for key in keys}) for path, keys in zip(paths, groups, strict=True)
        ]
        files = [TensorFile(*item) for item in zip(_names(entries), entries, groups, strict=True)]
        for path, file in zip(paths, files, strict=True):
            path.replace(directory / file.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    sync_directory(directory)
    return files


def write_manifest(directory: Path, data: bytes) -> None:
    """Put a description in the place of the one that is there: the one commit point."""
    path = _fresh(directory)
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        path.replace(directory / MANIFEST)
    finally:
        path.unlink(missing_ok=True)
    sync_directory(directory)


def remove_stale(directory: Path, named: Iterable[str]) -> None:
    """Remove tensor files that no description names, and what crashes have left half written; nothing else."""
    keep = set(named)
    ours = [path for path in directory.iterdir() if TENSOR_FILE.fullmatch(path.name) and path.name not in keep]
    for path in ours:
        with suppress(OSError):  # the save is done; what stays here is only waste
            path.unlink()
    for path in directory.glob(_HALF_WRITTEN):
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def sync_directory(directory: Path) -> None:
    """Ask that names in a directory reach the disk, where the system can be asked."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def hash_of(path: Path) -> str:
    """The sha256 of a file's bytes."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _fresh(directory: Path) -> Path:
    return directory / _HALF_WRITTEN.replace("*", secrets.token_hex(8))


def _written(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    path.touch()
    mode = path.stat().st_mode
    save_file(_apart(tensors), path, {"format": "pt"})  # by a file of its own beside it, which only its owner can read
    path.chmod(mode)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return FileEntry(bytes=path.stat().st_size, sha256=hash_of(path))


def _groups(tensors: Mapping[str, Tensor], most: int) -> list[list[str]]:
    """Keys in order, as many in a group as its bytes allow."""
    groups: list[list[str]] = []
    room = most
    for key, value in tensors.items():
        size = value.numel() * value.itemsize
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(key)
        room -= size
    return groups


def _names(entries: list[FileEntry]) -> list[str]:
    if len(entries) == 1:
        return [f"tensors-{entries[0].sha256[:12]}.safetensors"]
    common = sha256("".join(entry.sha256 for entry in entries).encode()).hexdigest()[:12]
    return [f"tensors-{common}-{i:05d}-of-{len(entries):05d}.safetensors" for i in range(1, len(entries) + 1)]


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors with memory of their own: views into one buffer are copied."""
    seen: set[tuple[torch.device, int]] = set()
    apart = {}
    for key, value in tensors.items():
        place = (value.device, value.untyped_storage().data_ptr())
        apart[key] = value.clone(memory_format=torch.contiguous_format) if place in seen else value.contiguous()
        seen.add(place)
    return apart
