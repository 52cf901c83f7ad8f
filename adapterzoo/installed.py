"""What installed packages offer: entry points of the group `adapterzoo.pieces`, imported when they are asked for.

A package makes its pieces known in its pyproject.toml. An entry is a module that registers pieces, or one of them; the
name on the left is for people, and the pieces keep the names of their classes:

    [project.entry-points."adapterzoo.pieces"]
    mine = "mypackage.mypieces"
"""

from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import NamedTuple

ENTRY_POINTS = "adapterzoo.pieces"


class Offer(NamedTuple):
    """An entry point of an installed package."""

    package: str
    """Its name and version."""
    point: EntryPoint

    def __str__(self) -> str:
        return f"{self.package} ({self.point.value})"


def offers() -> list[Offer]:
    """All there are now, in an order that does not depend on what was installed first."""
    found = {Offer(_package(point), point) for point in entry_points(group=ENTRY_POINTS)}
    return sorted(found, key=lambda offer: (offer.package, offer.point.name, offer.point.value))


def load(offer: Offer) -> object | None:
    """Import what an entry point names: None for a module, which has registered what it has, else the object.

    Raises:
        Exception: whatever the package raises as it is imported.
    """
    found = offer.point.load()
    return None if isinstance(found, ModuleType) else found


def reason(error: Exception) -> str:
    """An error of another package in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def package_of(module: str) -> str:
    """The package that a module is from: the installed one that offers pieces from there, else the outermost module."""
    root = module.partition(".")[0]
    near = [offer.package for offer in offers() if offer.point.module.partition(".")[0] == root]
    return near[0] if near else root


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.module.partition(".")[0]
