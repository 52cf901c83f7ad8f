"""The pieces of an adapted layer, each with the site that it sees."""

from dataclasses import replace

from adapterzoo.adapter import Adapter
from adapterzoo.layer import AdaptedLinear
from adapterzoo.pieces import Piece, layers_of
from adapterzoo.site import Site


def sites_of(layer: AdaptedLinear) -> list[tuple[Adapter, Site]]:
    """The adapter of every piece, from the outermost, and its site."""
    return [(part, replace(layer.site(), depth=part.spec.depth)) for part in layer.adapter.parts()]


def starts_neutral(spec: Piece) -> bool:
    """Whether every piece of a composition starts at W' = W."""
    return all(piece.starts_neutral for piece in layers_of(spec))
