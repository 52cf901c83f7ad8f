"""Every piece and named composition as a table."""

from collections.abc import Callable, Collection

from adapterzoo.analysis.tables import Cell, aligned
from adapterzoo.catalogue.docstrings import said
from adapterzoo.catalogue.facts import layers_in_words, piece_facts
from adapterzoo.errors import SpecError, listing
from adapterzoo.installed import package_of
from adapterzoo.pieces import Piece
from adapterzoo.registry import broken, compositions, pieces

KINDS = ("generators", "wrappers", "compositions")


def catalogue(kinds: Collection[str] = KINDS) -> str:
    """Tables of what there is, each in the order of names, and at the end what could not be loaded.

    Equations are of any length, so they stand last: in a narrow terminal they alone run over.

    Args:
        kinds: some of `KINDS`.
    """
    tables = [_table(kind) for kind in KINDS if kind in kinds]
    problems = broken()
    end = [f"packages that offer pieces and could not be loaded:{listing(problems)}"] if problems else []
    return "\n\n".join([*tables, *end])


def _table(kind: str) -> str:
    if kind == "compositions":
        header: tuple[Cell, ...] = (kind, "what it is", "from", "is", "equation")
        rows = [_composition(name, function) for name, function in sorted(compositions().items())]
    else:
        header = (kind, "what it is", "start", "layers", "from", "equation")
        rows = [_piece(found) for _, found in sorted(pieces().items()) if f"{piece_facts(found).kind}s" == kind]
    return aligned([header, *rows], left=len(header))


def _piece(kind: type[Piece]) -> tuple[Cell, ...]:
    facts = piece_facts(kind)
    start = "W' = W" if facts.starts_neutral else "beside W"
    return facts.name, facts.what, start, layers_in_words(facts.layers), facts.package, _sentence(facts.equation)


def _composition(name: str, function: Callable[..., Piece]) -> tuple[Cell, ...]:
    text = said(function)
    try:
        example = repr(function())
    except (TypeError, SpecError):  # it has no default for some argument
        example = ""
    return name, _sentence(text.what), package_of(function.__module__), example, _sentence(text.equation)


def _sentence(text: str) -> str:
    """The first sentence."""
    return text.partition(". ")[0]
