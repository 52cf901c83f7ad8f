"""Which cases a check runs: a piece alone, in pairs with every registered piece, and two deep."""

import random
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from adapterzoo.pieces import Generator, Piece, Wrapper
from adapterzoo.registry import pieces
from adapterzoo.site import LAYER_TYPES
from adapterzoo.testing.case import Case
from adapterzoo.testing.failure import NoExampleError
from adapterzoo.testing.layers import LAYERS
from adapterzoo.testing.options import Choose
from adapterzoo.testing.subject import Subject

_PLACES = 12
_DEEP = 4
_SEEDS = range(2**16)

Fields = dict[str, Any]
"""The fields of a case that say on which layer."""


def registered(kind: type[Generator] | type[Wrapper], layer_types: Collection[str] = LAYER_TYPES) -> list[type[Piece]]:
    """Every registered generator or wrapper that sits on a layer of one of some types."""
    return [each for each in pieces().values() if issubclass(each, kind) and each.layers & set(layer_types)]


def drawn_place(choose: Choose, layer: str, large: bool = False) -> Fields:
    """A small layer of a kind: fields of a `Case`.

    Args:
        choose: picks.
        layer: the kind.
        large: not quite so small.
    """
    kind = LAYERS[layer]
    shape, options = choose(kind.large if large else kind.shapes), choose(kind.options)
    if shape[0] % options.get("groups", 1):
        options = {}
    return {"layer": layer, "shape": shape, **options}


def drawn_case(
    choose: Choose, subject: Subject, layer: str, chain: Sequence[type[Piece]] = (), inside: int = 0
) -> Case | None:
    """The subject on a drawn layer of a kind, among other pieces; None if nothing that fits was found.

    Args:
        choose: picks.
        subject: what is checked.
        layer: the kind of layer.
        chain: other pieces, from the innermost outwards.
        inside: how many of them stand inside the subject.
    """
    for number in range(2 * _PLACES):
        place = drawn_place(choose, layer, large=number >= _PLACES)
        shape = Case("", **place).weight_shape
        links = [*map(Subject, chain[:inside]), subject, *map(Subject, chain[inside:])]
        spec: Piece | None = None
        for link in links:
            spec = link.drawn(shape, choose, spec)
            if spec is None:
                break
        if spec is not None:
            return Case(spec, seed=choose(_SEEDS), **place)
    return None


def layers_for(subject: Subject, exact: bool = True) -> list[str]:
    """The kinds of layers that a subject sits on and that can be built here."""
    return [
        name
        for name, kind in LAYERS.items()
        if kind.layer_type in subject.layers and kind.is_there and kind.exact == exact
    ]


def alone(subject: Subject, choose: Choose, layers: Sequence[str]) -> Iterator[Case]:
    """The subject by itself on every kind of layer; a wrapper around one generator or another.

    Raises:
        NoExampleError: a class declares a type of layer that no options were found for.
    """
    for layer in layers:
        insides = _generators_inside(subject, choose, layer)
        found = [drawn_case(choose, subject, layer, inside, len(inside)) for inside in insides]
        if subject.spec is None and insides and not any(found):
            tried = f"it declares {LAYERS[layer].layer_type} layers, and no options that were tried fit one"
            raise NoExampleError(subject.kind.__name__, tried)
        yield from filter(None, found)


def pairs(subject: Subject, choose: Choose, layers: Sequence[str]) -> Iterator[Case]:
    """The subject with every registered piece, each on one layer or another.

    Under every wrapper; and a class of wrappers around every generator, and around every wrapper of a drawn one.
    """
    chains: list[tuple[list[type[Piece]], int]] = []
    if subject.needs_inside:
        chains += [([each], 1) for each in registered(Generator)]
    for wrapper in registered(Wrapper):
        generators = registered(Generator, wrapper.layers) if subject.needs_inside else []
        chains.append(([choose(generators), wrapper], 2) if generators else ([wrapper], 0))
    for chain, inside in chains:
        own = [layer for layer in layers if all(LAYERS[layer].layer_type in each.layers for each in chain)]
        case = drawn_case(choose, subject, choose(own), chain, inside) if own else None
        if case is not None:
            yield case


def deep(subject: Subject, choose: Choose, layers: Sequence[str]) -> Iterator[Case]:
    """The subject with two other pieces, drawn: two deep."""
    for _ in range(_DEEP):
        layer = choose(layers)
        wrappers = registered(Wrapper, {LAYERS[layer].layer_type})
        generators = registered(Generator, {LAYERS[layer].layer_type})
        if not wrappers or not generators:
            return
        chain = [choose(generators), choose(wrappers)] if subject.needs_inside else [choose(wrappers), choose(wrappers)]
        case = drawn_case(choose, subject, layer, chain, choose([1, 2]) if subject.needs_inside else 0)
        if case is not None:
            yield case


def _generators_inside(subject: Subject, choose: Choose, layer: str) -> list[list[type[Piece]]]:
    """Two ways to fill a wrapper; a subject that needs no inside is drawn twice."""
    if not subject.needs_inside:
        return [[], []]
    generators = registered(Generator, {LAYERS[layer].layer_type})
    return [[choose(generators)] for _ in range(2)] if generators else []


def seeded(*words: object) -> Choose:
    """Choices that follow from some words."""
    return random.Random(" ".join(map(str, words))).choice
