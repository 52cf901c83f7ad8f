"""What a grid says: a task, the compositions compared on it, the seeds, and the search that every cell makes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from adapterzoo.ablation.grids.axes import Axes
from adapterzoo.ablation.grids.reading import read_file, read_yaml
from adapterzoo.ablation.grids.tune import Tune
from adapterzoo.errors import GridError, did_you_mean, listing

DEFAULT_SEEDS = (0, 1, 2)


class Reference(BaseModel):
    """A composition beside the grid, which no wrapper is put around.

    Args:
        spec: such as "Full()"; "None" trains the head alone.
        label: what tables call it; the spec if not given.
        tune: a search of its own, of as many trials as the grid's: a head bears other learning rates than factors do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: str
    label: str = ""
    tune: Tune | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, given: Any) -> Any:
        return {"spec": "None"} if given is None else {"spec": given} if isinstance(given, str) else given


class Outline(BaseModel):
    """What a grid says, read and checked by itself; `Grid` adds what can be done with it.

    Args:
        task: the task's name and options: {name: digits, steps: 100}.
        grid: axes, or a list of them; their products are run.
        references: compositions beside the grid.
        tune: the search of every cell; without it all run at the task's options.
        name: of the grid, for its page; that of its file if not given.

    Raises:
        GridError: from `read`, `from_yaml` and `of`, with everything that is wrong.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: dict[str, Any]
    grid: tuple[Axes, ...]
    references: tuple[Reference, ...] = ()
    tune: Tune | None = None
    name: str = ""

    @field_validator("grid", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        axes = given if isinstance(given, list | tuple) else [given]
        if not axes:
            raise ValueError("give at least one mapping of axes")
        return axes

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        stated = {axes.seed for axes in self.grid if axes.seed is not None}
        if len(stated) > 1:
            raise ValueError("all products of a grid have the same seeds, or runs would not be pairs")
        if self.tune is not None:
            both = sorted(set(self.seeds) & set(self.tune.seeds))
            if both:
                raise ValueError(f"tune.seeds: {both} are reported too; a search needs seeds of its own")
        return self

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """A grid from YAML text."""
        return cls.of(read_yaml(text), "the grid")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """A grid from a YAML file."""
        content = read_file(Path(path))
        return cls.of({"name": Path(path).stem, **content}, f"the grid {str(path)!r}")

    @classmethod
    def of(cls, content: Mapping[str, Any], source: str = "the grid") -> Self:
        """A grid from a mapping, with errors as sentences.

        Raises:
            GridError: everything that is wrong with it.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise GridError(f"{source} can't be run:{listing([_problem(item) for item in error.errors()])}") from None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the reported runs."""
        return next((axes.seed for axes in self.grid if axes.seed is not None), DEFAULT_SEEDS)


def _problem(item: Mapping[str, Any]) -> str:
    place = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        known = _fields(item["loc"])
        return f"unknown field {place!r}; known: {', '.join(known)}{did_you_mean(str(item['loc'][-1]), known)}"
    if item["type"] == "missing":
        return f"{place} is missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def _fields(place: Sequence[int | str]) -> list[str]:
    """The fields of the part of a grid in which an unknown one was found."""
    parts: dict[str, type[BaseModel]] = {"references": Reference, "tune": Tune}
    return list(parts.get(str(place[0]), Outline).model_fields) if len(place) > 1 else list(Outline.model_fields)
