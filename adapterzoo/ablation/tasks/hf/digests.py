"""Hashes of files: of data sets, and of models that are gigabytes."""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path


def digest_of_files(paths: Sequence[Path]) -> str:
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


def files_below(place: Path) -> list[Path]:
    """Every file of a folder, but for hidden ones."""
    return sorted(
        path
        for path in place.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(place).parts)
    )
