"""PEFT's own rules for names: which modules an entry of its config means, and how to mean exactly some."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's own modules."""

V = TypeVar("V", int, float)


def is_meant(entries: str | Collection[str], name: str) -> bool:
    """Whether target_modules or exclude_modules means a module: an expression, or names and tails of names at a dot."""
    if isinstance(entries, str):
        return re.fullmatch(entries, name) is not None
    return name in entries or name.endswith(tuple("." + entry for entry in entries))


def is_saved(entries: Iterable[str], name: str) -> bool:
    """Whether modules_to_save means a module: by the end of its name, at a dot or not."""
    return name.endswith(tuple(entries))


def bars(entries: Iterable[str], name: str) -> bool:
    """Whether an entry of modules_to_save keeps PEFT from adapting a module: it stands at dots in its name."""
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in entries)


def index_of_layer(name: str, patterns: Sequence[str]) -> int | None:
    """The number that layers_to_transform counts by: the first in a name, or the first after a layers_pattern."""
    searches = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next(filter(None, (re.match(search, name) for search in searches)), None)
    return None if found is None else int(found.group(1))


def value_for(patterns: Mapping[str, V], name: str, default: V) -> V:
    """What rank_pattern or alpha_pattern says of a module: the first key that is its name or a tail of it at a dot."""
    keys = (key for key in patterns if _tail(key).match(name))
    return patterns.get(next(keys, name), default)


@lru_cache(maxsize=10_000)  # re's own cache is too small for a pattern with a key for every layer
def _tail(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def exact_targets(targets: Sequence[str], names: Iterable[str]) -> list[str] | str:
    """target_modules that mean these modules of a model and no others: their names, or an expression.

    A name means modules whose names end with it too, so where there are such modules an expression has to be given.

    Args:
        targets: full names.
        names: the names of all modules of the model.
    """
    own = set(targets)
    if not any(is_meant(targets, name) for name in names if name not in own):
        return sorted(own)
    return "|".join(re.escape(name) for name in sorted(own))


def exact_patterns(values: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """The most frequent of some values by module, and a pattern that means exactly the other modules."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {"^" + re.escape(name): value for name, value in values.items() if value != usual}
