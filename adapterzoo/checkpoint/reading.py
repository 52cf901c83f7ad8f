"""Reading the description of a directory, checked against itself."""

import stat
from importlib import metadata
from pathlib import Path

from adapterzoo.checkpoint.contradictions import contradictions
from adapterzoo.checkpoint.manifest import AdapterEntry, Manifest, manifest_of
from adapterzoo.checkpoint.storage import MANIFEST
from adapterzoo.checkpoint.strict_json import LARGEST, loads
from adapterzoo.checkpoint.wording import short, shown, telling
from adapterzoo.errors import CheckpointError, did_you_mean


def library_version() -> str:
    """The version of this library, as it is installed."""
    try:
        return metadata.version("adapterzoo")
    except metadata.PackageNotFoundError:  # run from its sources
        return "unknown"


def manifest_in(directory: Path) -> Manifest:
    """The description in a directory, read strictly and checked against itself.

    Raises:
        CheckpointError: there is none, it can't be read, or it contradicts itself.
    """
    where = shown(directory / MANIFEST)
    manifest = manifest_of(loads(_bytes(directory), where), where)
    problems = contradictions(manifest)
    if problems:
        raise CheckpointError(f"{where} contradicts itself", problems)
    return manifest


def adapter_in(manifest: Manifest, name: str, directory: Path) -> AdapterEntry:
    """The adapter of that name; raise a CheckpointError that names the others if there is none."""
    if name in manifest.adapters:
        return manifest.adapters[name]
    known = ", ".join(map(repr, manifest.adapters))
    near = did_you_mean(str(name)[:80], manifest.adapters)
    raise CheckpointError(f"{shown(directory)} holds no adapter {short(name)}; it holds {known}{near}")


def no_plain_file(directory: Path, name: str) -> str | None:
    """Say what is wrong with a file of a directory, as the end of a sentence; None if it is a plain file in it."""
    path = directory / name
    if not path.exists():
        return "leads nowhere" if path.is_symlink() else "is not there"
    if not path.resolve().is_relative_to(directory.resolve()):
        return "is a link that leads out of the directory; put the file itself there"
    return None if stat.S_ISREG(path.stat().st_mode) else "is no plain file"


def _bytes(directory: Path) -> bytes:
    path = directory / MANIFEST
    with telling(f"{shown(path)} can't be read"):
        problem = no_plain_file(directory, MANIFEST)
        if problem is not None:
            raise CheckpointError(f"{shown(path)} {problem}{_instead(directory)}")
        with path.open("rb") as file:
            return file.read(min(path.stat().st_size, LARGEST) + 1)  # a read makes room for all that it asks for


def _instead(directory: Path) -> str:
    if not directory.exists():
        return "; there is no such directory"
    if not directory.is_dir():
        return "; give the directory, not a file"
    foreign = (directory / "adapter_config.json").exists()
    return "; the adapter_config.json there is PEFT's: import_peft reads it" if foreign else ""
