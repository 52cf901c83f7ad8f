"""What is checked: a class of pieces with options that are drawn, or one composition as it is."""

from dataclasses import dataclass

from adapterzoo.base import WeightShape
from adapterzoo.errors import SpecError, UnknownPieceError
from adapterzoo.pieces import Generator, Piece, Wrapper, layers_of, misfit
from adapterzoo.registry import compositions, parse, piece, pieces
from adapterzoo.site import LAYER_TYPES
from adapterzoo.testing.options import Choose, drawn_options

_TRIES = 60

Checkable = type[Piece] | Piece | str
"""A class of pieces, a spec, or the name or text of one."""


@dataclass(frozen=True)
class Subject:
    """A class, or a composition.

    Args:
        kind: the class; of a composition, that of its outermost piece.
        spec: the composition; None for a class.
    """

    kind: type[Piece]
    spec: Piece | None = None

    @classmethod
    def of(cls, what: Checkable) -> "Subject":
        """Read what a user gave.

        Raises:
            UnknownPieceError: a name that is not registered.
            SpecError: no class of pieces, spec or text.
        """
        if isinstance(what, str):
            what = _named(what)
        if isinstance(what, Piece):
            return cls(type(what), what)
        if isinstance(what, type) and issubclass(what, (Generator, Wrapper)):
            return cls(what)
        raise SpecError(f"checks take a class of pieces, a spec or its text, such as 'LoRA', not {what!r}")

    @property
    def name(self) -> str:
        """The class's name, or the composition."""
        return self.kind.__name__ if self.spec is None else repr(self.spec)

    @property
    def needs_inside(self) -> bool:
        """Whether it is a class of wrappers, which something has to be put into."""
        return self.spec is None and issubclass(self.kind, Wrapper)

    @property
    def layers(self) -> frozenset[str]:
        """The types of layers that it sits on."""
        chain = [self.kind] if self.spec is None else [type(each) for each in layers_of(self.spec)]
        return LAYER_TYPES.intersection(*(each.layers for each in chain))

    def drawn(self, shape: WeightShape, choose: Choose, inner: Piece | None = None) -> Piece | None:
        """A spec that fits a weight of that shape; None if none was found."""
        if self.spec is not None:
            return None if misfit(self.spec, shape) else self.spec
        return drawn_piece(self.kind, shape, choose, inner)


def drawn_piece(kind: type[Piece], shape: WeightShape, choose: Choose, inner: Piece | None = None) -> Piece | None:
    """A spec of a class, with drawn options, that fits a weight of that shape; None if none was found.

    Args:
        kind: the class.
        shape: of the weight.
        choose: picks.
        inner: what a wrapper wraps.
    """
    inside = {} if inner is None else {"inner": inner}
    for _ in range(_TRIES):
        try:
            spec = kind(**inside, **drawn_options(kind, shape, choose))
        except SpecError:
            continue
        if spec.misfit(shape) is None:
            return spec
    return None


def _named(text: str) -> Piece | type[Piece]:
    if "(" in text:
        return parse(text)
    if text in compositions():
        return compositions()[text]()
    try:
        return piece(text)
    except UnknownPieceError:
        raise UnknownPieceError(text, [*pieces(), *compositions()]) from None
