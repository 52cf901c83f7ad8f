"""What there is to know of a composition on a layer: its pieces, what they hold, and what it costs beside LoRA."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from adapterzoo.adapter import Adapter
from adapterzoo.base import WeightShape
from adapterzoo.catalogue.costs import Cost, adapted, adapted_cost, bare_cost, bare_layer, thin_columns
from adapterzoo.catalogue.docstrings import said
from adapterzoo.errors import AdapterError, PieceError
from adapterzoo.installed import package_of, reason
from adapterzoo.layer import AdaptedLinear
from adapterzoo.pieces import LAYER_TYPES, Generator, Piece, Role
from adapterzoo.registry import parse

T = TypeVar("T")


@dataclass(frozen=True)
class Held:
    """A parameter or buffer of a piece on a layer."""

    name: str
    role: str
    shape: tuple[int, ...]
    numbers: int
    trains: bool
    shared: bool


@dataclass(frozen=True)
class PieceFacts:
    """One piece of a composition, in the words of its own docstring, with what it holds on a layer."""

    name: str
    kind: str
    what: str
    equation: str
    further: tuple[str, ...]
    package: str
    starts_neutral: bool
    layers: tuple[str, ...]
    shapes: str
    source: str
    deviations: str
    holds: tuple[Held, ...] = ()


@dataclass(frozen=True)
class Costs:
    """A forward's multiply-adds: of the bare layer, of the composition, and of a LoRA to compare it with.

    `own` is None, and `why_not` says why, where a piece reads values and can't be counted without them.
    """

    base: Cost
    own: Cost | None
    why_not: str
    lora: Cost
    lora_spec: str
    lora_trained: int


@dataclass(frozen=True)
class Shown:
    """A composition on a layer."""

    spec: str
    shape: WeightShape
    pieces: tuple[PieceFacts, ...]
    costs: Costs

    @property
    def trained(self) -> int:
        """Numbers that train."""
        return sum(held.numbers for piece in self.pieces for held in piece.holds if held.trains)

    @property
    def buffers(self) -> int:
        """Numbers that are kept and do not train."""
        return sum(held.numbers for piece in self.pieces for held in piece.holds if not held.trains)

    @property
    def share(self) -> float:
        """What trains over the numbers of W."""
        return self.trained / (self.shape.out_features * self.shape.in_features)

    @property
    def starts_neutral(self) -> bool:
        """Whether it starts at W' = W."""
        return all(piece.starts_neutral for piece in self.pieces)

    def tree(self) -> dict[str, Any]:
        """Everything, for machines."""
        totals = ("trained", "buffers", "share", "starts_neutral")
        return {**asdict(self), "shape": self.shape._asdict(), **{name: getattr(self, name) for name in totals}}


def shown(spec: Piece, shape: WeightShape) -> Shown:
    """Look at a composition on a layer of that shape, without values.

    Raises:
        MisfitError: it does not fit that shape.
        PieceError: a piece makes no initial values without values of the weight.
    """
    try:
        layer = adapted(shape, spec)
    except AdapterError:
        raise
    except Exception as error:  # whatever torch says where a piece reads values that are not there
        raise PieceError(f"{spec!r} can't be built on the meta device, without values: {reason(error)}") from error
    pieces = tuple(piece_facts(part.spec, tuple(_holds(part))) for part in layer.adapter.parts())
    return Shown(repr(spec), shape, pieces, _costs(layer))


def piece_facts(piece: Piece | type[Piece], holds: tuple[Held, ...] = ()) -> PieceFacts:
    """What a piece's class says of itself."""
    kind = type(piece) if isinstance(piece, Piece) else piece
    text = said(kind)
    return PieceFacts(
        name=kind.__name__,
        kind="generator" if issubclass(kind, Generator) else "wrapper",
        what=text.what,
        equation=text.equation,
        further=text.further,
        package=package_of(kind.__module__),
        starts_neutral=kind.starts_neutral,
        layers=tuple(sorted(kind.layers)),
        shapes=text.sections.get("Shapes", ""),
        source=text.sections.get("Source", ""),
        deviations=text.sections.get("Deviations", ""),
        holds=holds,
    )


def layers_in_words(layers: tuple[str, ...]) -> str:
    """The types of layers that a piece sits on; "all" for all."""
    return "all" if set(layers) == LAYER_TYPES else ", ".join(layers)


def _holds(part: Adapter) -> Iterator[Held]:
    for name, value in part.values().items():
        role, shared = part.roles[name], name in part.spec.shared
        yield Held(name, role.value, tuple(value.shape), value.numel(), role is not Role.BUFFER, shared)


def _costs(layer: AdaptedLinear) -> Costs:
    shape = layer.shape
    lora = _lora_beside(layer)
    held = adapted(shape, lora)
    trained = sum(value.numel() for value in held.adapter.parameters())
    own, why_not = _tried(lambda: adapted_cost(layer))
    return Costs(bare_cost(bare_layer(shape)), own, why_not, adapted_cost(held), repr(lora), trained)


def _lora_beside(layer: AdaptedLinear) -> Piece:
    """The LoRA of the same rank; where the update is no thin product, the one that trains about as many numbers."""
    shape = layer.shape
    trained = sum(value.numel() for value in layer.adapter.parameters())
    rank = _tried(lambda: thin_columns(layer))[0] or round(trained / (shape.out_features + shape.in_features))
    return parse(f"LoRA(r={min(max(rank, 1), shape.out_features, shape.in_features)})")


def _tried(count: Callable[[], T]) -> tuple[T | None, str]:
    """What is counted, or why a piece can't be run without values, in whatever way torch refuses that."""
    try:
        return count(), ""
    except AdapterError:
        raise
    except Exception as error:
        return None, reason(error)


def matrix(out_features: int, in_channels: int, kernel: tuple[int, ...]) -> WeightShape:
    """The shape of a layer's weight as a matrix."""
    return WeightShape(out_features, in_channels * math.prod(kernel), kernel)
