"""Hypothesis strategies: structure is drawn (layers, options, composition trees, a seed), values come from the seed."""

from typing import Any, cast

from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from adapterzoo.base import WeightShape
from adapterzoo.pieces import Generator, Piece, Wrapper
from adapterzoo.registry import pieces
from adapterzoo.site import Site
from adapterzoo.testing.case import Case
from adapterzoo.testing.drawing import drawn_place, registered
from adapterzoo.testing.layers import LAYERS
from adapterzoo.testing.options import Choose
from adapterzoo.testing.subject import Checkable, Subject, drawn_piece


@st.composite
def layers(draw: DrawFn, layer_type: str | None = None) -> dict[str, Any]:
    """Small layers, as the fields of a `Case`: kind, shape, bias, stride, padding, groups.

    Args:
        draw: hypothesis's own.
        layer_type: "linear", "convolution" or "embedding"; any of them if None.
    """
    own = [
        name for name, kind in LAYERS.items() if kind.exact and kind.is_there and layer_type in (None, kind.layer_type)
    ]
    return drawn_place(_choice(draw), draw(st.sampled_from(own)))


@st.composite
def sites(draw: DrawFn, layer_type: str | None = None) -> Site:
    """What a piece may know of a small layer: for `init` and `update` by hand, in float64.

    Args:
        draw: hypothesis's own.
        layer_type: "linear", "convolution" or "embedding"; any of them if None.
    """
    return Case("", seed=draw(st.integers(0, 2**16)), **draw(layers(layer_type))).site()


@st.composite
def specs(draw: DrawFn, what: Checkable, shape: WeightShape, inner: Piece | None = None) -> Piece:
    """Specs of a piece with drawn options, that fit a weight of that shape.

    Args:
        draw: hypothesis's own.
        what: a class of pieces or its name; a spec gives itself.
        shape: of the weight.
        inner: what a wrapper wraps.
    """
    found = Subject.of(what).drawn(shape, _choice(draw), inner)
    assume(found is not None)
    return cast(Piece, found)


@st.composite
def compositions(draw: DrawFn, shape: WeightShape, depth: int = 3, layer_type: str = "linear") -> Piece:
    """Composition trees of registered pieces: a generator, and up to `depth` wrappers around it.

    Args:
        draw: hypothesis's own.
        shape: of the weight.
        depth: the most wrappers.
        layer_type: of the layer that it has to sit on.
    """
    spec = _fitting(draw, draw(st.sampled_from(registered(Generator, {layer_type}))), shape, None)
    for kind in draw(st.lists(st.sampled_from(registered(Wrapper, {layer_type})), max_size=depth)):
        spec = _fitting(draw, kind, shape, spec)
    return spec


@st.composite
def cases(draw: DrawFn, depth: int = 3) -> Case:
    """Compositions of registered pieces on small layers, as the checks take them: `check_values(case)`.

    Args:
        draw: hypothesis's own.
        depth: the most wrappers.
    """
    place = draw(layers())
    empty = Case("", **place)
    spec = draw(compositions(empty.weight_shape, depth, empty.layer_type))
    return Case(spec, seed=draw(st.integers(0, 2**16)), **place)


def names() -> SearchStrategy[str]:
    """Names of registered pieces."""
    return st.sampled_from(sorted(pieces()))


def _fitting(draw: DrawFn, kind: type[Piece], shape: WeightShape, inner: Piece | None) -> Piece:
    found = drawn_piece(kind, shape, _choice(draw), inner)
    assume(found is not None)
    return cast(Piece, found)


def _choice(draw: DrawFn) -> Choose:
    return lambda values: draw(st.sampled_from(values))
