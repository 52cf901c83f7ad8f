"""Options of any piece, from what its fields declare: the default, and values that the limits allow."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, product
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from adapterzoo.base import WeightShape
from adapterzoo.pieces import Piece

T = TypeVar("T")

Choose = Callable[[Sequence[Any]], Any]
"""Picks one of some values: `random.Random(seed).choice`, or hypothesis."""

NUMBERS = (0.25, 0.5, 3.0, 16.0, -0.5, 0.1, 1.0, 0.9)
WHOLE_NUMBERS = (1, 2, 3, 0, 4, -1)
_MOST = 40

KEPT = frozenset({"dropout"})
"""Fields that keep their default: what is random in training has a check of its own."""


def drawn_options(kind: type[Piece], shape: WeightShape, choose: Choose) -> dict[str, Any]:
    """Options of a class, one of its `examples` or field by field; they may still be refused together.

    Args:
        kind: the class.
        shape: of the weight that the piece should fit.
        choose: picks.
    """
    examples: Sequence[Mapping[str, Any]] = kind.examples(shape)
    if examples:
        return dict(choose(list(examples)))
    options = {}
    for name, field in kind.model_fields.items():
        if name == "inner" or (name in KEPT and not field.is_required()):
            continue
        values = candidates(field)
        if not values or (not field.is_required() and choose([True, False, False])):
            continue  # as it is by default
        options[name] = choose(values)
    return options


def candidates(field: FieldInfo) -> list[Any]:
    """Values that a field's type and limits allow, its default among them; none if nothing is known."""
    found = [] if field.is_required() else [field.get_default(call_default_factory=True)]
    limits = list(field.metadata)
    for value in islice(_values(field.annotation, limits), _MOST):
        if not any(type(value) is type(known) and value == known for known in found):
            found.append(value)
    return found


def _values(annotation: Any, limits: Sequence[Any]) -> Iterator[Any]:
    """Values of a type, within limits."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _values(arguments[0], [*limits, *_spelt_out(arguments[1:])])
    elif origin in (Union, UnionType):
        for member in arguments:
            yield from _values(member, limits)
    elif origin is Literal:
        yield from arguments
    elif origin is tuple:
        yield from _tuples(arguments, limits)
    elif annotation is bool:
        yield from (True, False)
    elif annotation is NoneType or annotation is None:
        yield None
    elif annotation is int or annotation is float:
        yield from (value for value in (WHOLE_NUMBERS if annotation is int else NUMBERS) if _within(value, limits))


def _tuples(arguments: tuple[Any, ...], limits: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Tuples of some length, each position with the first few values of its type."""
    if arguments[-1:] == (Ellipsis,):
        least, most = _limit(limits, "min_length", 1), _limit(limits, "max_length", 3)
        shapes = [(arguments[0],) * length for length in range(least, most + 1)]
    else:
        shapes = [arguments]
    for members in shapes:
        few = [list(islice(_values(member, ()), 2)) for member in members]
        yield from islice(product(*few), 6)


def _spelt_out(metadata: Sequence[Any]) -> list[Any]:
    """Limits inside a Field(...) beside others."""
    return [item for each in metadata for item in (each.metadata if isinstance(each, FieldInfo) else [each])]


def _within(value: float, limits: Sequence[Any]) -> bool:
    rules: dict[str, Callable[[float, float], bool]] = {
        "ge": lambda value, limit: value >= limit,
        "gt": lambda value, limit: value > limit,
        "le": lambda value, limit: value <= limit,
        "lt": lambda value, limit: value < limit,
        "multiple_of": lambda value, limit: value % limit == 0,
    }
    return all(
        getattr(item, name, None) is None or rule(value, getattr(item, name))
        for item in limits
        for name, rule in rules.items()
    )


def _limit(limits: Sequence[Any], name: str, default: int) -> int:
    return next((getattr(item, name) for item in limits if getattr(item, name, None) is not None), default)
