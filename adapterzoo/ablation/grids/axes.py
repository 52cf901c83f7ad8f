"""Axes: the values that a grid varies, and the templates that they are put into."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

BARE = "bare"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
Templates = dict[str, str]
"""Labels to templates; the label "" is made from the template."""


class Seeds(BaseModel):
    """Seeds of the reported runs: `count` of them from `first` on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: Annotated[int, Field(ge=1)]
    first: Annotated[int, Field(ge=0)] = 0

    def numbers(self) -> tuple[int, ...]:
        """The seeds themselves."""
        return tuple(range(self.first, self.first + self.count))


class Axes(BaseModel):
    """One product of axes; a grid may be the union of several.

    Args:
        spec: templates of generators, or of whole compositions, such as "LoRA(r={r})"; or a mapping from labels.
        wrap: templates of what is put around them, such as "MAP({spec})"; "{spec}" alone is the bare generator.
        seed: {count: 8}, or a list.
        others: every other axis: its values. Its name is a placeholder of the templates or an option of the task.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: Templates
    wrap: Templates = {BARE: "{spec}"}
    seed: tuple[int, ...] | None = None
    others: dict[str, tuple[Any, ...]] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, given: Any) -> Any:
        """What is neither spec, wrap nor seed is an axis of its own."""
        if not isinstance(given, Mapping):
            return given
        own = {name: given[name] for name in ("spec", "wrap", "seed") if name in given}
        rest = {str(name): value for name, value in given.items() if name not in own}
        others = rest["others"] if set(rest) == {"others"} and isinstance(rest["others"], Mapping) else rest
        return {**own, "others": {name: _values(name, value) for name, value in others.items()}}

    @field_validator("spec", "wrap", mode="before")
    @classmethod
    def _labelled(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            return {str(label): text for label, text in given.items()}
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ValueError("give a list of templates, such as ['LoRA(r={r})'], or a mapping from labels to templates")
        repeated = {text for text in texts if list(texts).count(text) > 1}
        if repeated:
            raise ValueError(f"{sorted(repeated)[0]!r} comes twice")
        return _labels(texts)

    @field_validator("spec", "wrap")
    @classmethod
    def _some(cls, templates: Templates) -> Templates:
        if not templates:
            raise ValueError("this axis is empty: give it at least one template")
        return templates

    @field_validator("wrap")
    @classmethod
    def _wraps(cls, templates: Templates) -> Templates:
        wrong = [text for text in templates.values() if _PLACEHOLDER.findall(text).count("spec") != 1]
        if wrong:
            raise ValueError(f"{wrong[0]!r} must hold {{spec}} once, as in 'MAP({{spec}})'")
        # Whatever it was called: the bare generator is the reference of its wrappers.
        return {BARE if text.strip() == "{spec}" else label: text for label, text in templates.items()}

    @field_validator("seed", mode="before")
    @classmethod
    def _counted(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            return Seeds.model_validate(given).numbers()
        if isinstance(given, int) and not isinstance(given, bool):
            raise ValueError(f"{given} could be a count or a seed: write {{count: {given}}} or [{given}]")
        return given

    @model_validator(mode="after")
    def _different_seeds(self) -> Self:
        if self.seed is not None and (not self.seed or len(set(self.seed)) < len(self.seed) or min(self.seed) < 0):
            raise ValueError(f"seed: {list(self.seed)} must be whole numbers ≥ 0, at least one, and different")
        return self

    def placeholders(self) -> set[str]:
        """Names that templates hold, but for {spec}."""
        return {name for text in (*self.spec.values(), *self.wrap.values()) for name in placeholders(text)} - {"spec"}


@dataclass(frozen=True)
class Combination:
    """One spec template under one wrap template, with values for what they hold and for the task's options."""

    generator: str
    wrapper: str
    text: str
    values: Mapping[str, Any]


def combinations(axes: Axes, options: Iterable[str]) -> list[Combination]:
    """Every combination: an axis that neither the templates nor the task use in it does not multiply it.

    Args:
        axes: one product.
        options: which of the other axes are options of the task.
    """
    found = []
    for (generator, spec), (wrapper, wrap) in product(axes.spec.items(), axes.wrap.items()):
        template = wrap.replace("{spec}", spec)
        used = [name for name in axes.others if name in set(options) | placeholders(template)]
        for values in product(*(axes.others[name] for name in used)):
            chosen = dict(zip(used, values, strict=True))
            found.append(Combination(generator, wrapper, fill(template, chosen), chosen))
    return found


def placeholders(template: str) -> set[str]:
    """Names in braces.

    Example:
        >>> sorted(placeholders("SORA({spec}, rank={k})"))
        ['k', 'spec']
    """
    return set(_PLACEHOLDER.findall(template))


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The template with values in the place of names; names without a value stay.

    Example:
        >>> fill("FLoRA(r={r}, alpha={alpha})", {"r": [2, 1], "alpha": 4})
        'FLoRA(r=(2, 1), alpha=4)'
    """
    return _PLACEHOLDER.sub(lambda found: _text(values[found[1]]) if found[1] in values else found[0], template)


def _text(value: Any) -> str:
    return repr(tuple(value)) if isinstance(value, list | tuple) else str(value)


def _values(name: str, given: Any) -> list[Any]:
    values = list(given) if isinstance(given, list | tuple) else [given]
    if isinstance(given, Mapping):
        raise ValueError(f"axis {name!r} is a mapping; give a list of values")
    if not values:
        raise ValueError(f"axis {name!r} is empty: give it at least one value, or leave it out")
    if len(set(map(repr, values))) < len(values):
        raise ValueError(f"axis {name!r} has a value twice: {values}")
    return values


def _labels(templates: Iterable[str]) -> Templates:
    """A label for each template: its piece's name, the wrap without {spec}; the whole text where that is not unique."""
    texts = list(templates)
    short = [_short(text) for text in texts]
    return {label if short.count(label) == 1 else text: text for label, text in zip(short, texts, strict=True)}


def _short(text: str) -> str:
    if "{spec}" not in text:
        return text.split("(", 1)[0].strip()
    if text.strip() == "{spec}":
        return BARE
    return text.replace("({spec})", "").replace("{spec}, ", "").replace("{spec}", "").strip()
