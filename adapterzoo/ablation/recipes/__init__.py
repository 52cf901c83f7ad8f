"""Recipes: grids that come with the package, for `adapterzoo ablate recipe:NAME`."""

from pathlib import Path

from adapterzoo.errors import GridError, did_you_mean

_FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Every recipe, by name.

    Example:
        >>> "map-table-2" in recipe_names(), "map-table-2-small" in recipe_names()
        (True, True)
    """
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe.

    Args:
        name: such as "map-table-2-small".

    Raises:
        GridError: there is no such recipe; names the nearest.

    Example:
        >>> recipe_path("map-table-2").name
        'map-table-2.yaml'
    """
    names = recipe_names()
    if name not in names:
        raise GridError(f"unknown recipe {name!r}; recipes: {', '.join(names)}{did_you_mean(name, names)}")
    return _FOLDER / f"{name}.yaml"
