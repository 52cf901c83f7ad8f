"""Where a model is: a folder, an installed package, or else the hub."""

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from adapterzoo.errors import GridError, MissingPackageError, did_you_mean

PACKAGE = "package:"


def place_of(name: str) -> str:
    """The folder that a name means; a name on the hub stays as it is.

    Raises:
        MissingPackageError: "package:NAME" of a package that is not installed.
        GridError: a package without that folder.
    """
    if not name.startswith(PACKAGE):
        folder = Path(name).expanduser()
        return str(folder) if folder.is_dir() else name
    package, _, below = name.removeprefix(PACKAGE).partition("/")
    if find_spec(package) is None:
        raise MissingPackageError(f"{name!r}: the package {package!r} is not installed (pip install {package})")
    root = Path(str(files(package)))
    if not (root / below).is_dir():
        there = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise GridError(f"{name!r}: {package} has no folder {below!r}{did_you_mean(below, there)}")
    return str(root / below)
