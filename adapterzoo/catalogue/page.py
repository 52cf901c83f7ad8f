"""A composition on a layer, as text."""

import textwrap

from adapterzoo.analysis.tables import Cell, aligned
from adapterzoo.base import WeightShape
from adapterzoo.catalogue.costs import Cost
from adapterzoo.catalogue.facts import Costs, Held, PieceFacts, Shown, layers_in_words

_INDENT = "  "
_WIDTH = 110


def page(found: Shown) -> str:
    """Everything that is known of a composition on a layer: piece by piece, and what it comes to."""
    title = f"{found.spec} on {_layer(found.shape)}"
    return "\n\n".join([title, *map(_piece, found.pieces), _totals(found), _cost(found)])


def _layer(shape: WeightShape) -> str:
    out, cols, kernel = shape
    if not kernel:
        return f"a linear layer, W: [{out:,}, {cols:,}]"
    sizes = "x".join(map(str, kernel))
    return f"a convolution with {shape.in_channels:,} channels and kernel {sizes}, W: [{out:,}, {cols:,}]"


def _piece(piece: PieceFacts) -> str:
    blocks = [f"{piece.name}: {piece.what}" if piece.what else piece.name]
    blocks += [_filled(text) for text in (piece.equation, *piece.further) if text]
    table = f"\n{textwrap.indent(_table(piece.holds), _INDENT)}\n" if piece.holds else ""
    return "\n".join([*blocks, table, *(_filled(f"{name:<12}{text}", 12) for name, text in _said(piece))])


def _filled(text: str, hang: int = 0) -> str:
    """Lines of a bearable length, those after the first further in by `hang`."""
    width, rest = _WIDTH - len(_INDENT), " " * hang
    lines = [textwrap.fill(line, width, subsequent_indent=rest, break_long_words=False) for line in text.split("\n")]
    return textwrap.indent("\n".join(lines), _INDENT)


def _said(piece: PieceFacts) -> list[tuple[str, str]]:
    start = "W' = W" if piece.starts_neutral else "beside W"
    return [
        ("shapes", piece.shapes or "its docstring has no Shapes section"),
        ("start", start),
        ("layers", layers_in_words(piece.layers)),
        ("from", piece.package),
        ("source", piece.source or "its docstring has no Source section"),
        ("deviations", piece.deviations or "its docstring has no Deviations section"),
    ]


def _table(holds: tuple[Held, ...]) -> str:
    rows: list[tuple[Cell, ...]] = [("holds", "role", "shape", "numbers")]
    rows += [(held.name, _role(held), f"{list(held.shape)}", held.numbers) for held in holds]
    return aligned(rows, left=3)


def _role(held: Held) -> str:
    return held.role + (", shared by layers" if held.shared else "")


def _totals(found: Shown) -> str:
    rows: list[tuple[Cell, ...]] = [
        ("trained", found.trained, f"{found.share:.4%} of W"),
        ("buffers", found.buffers, ""),
    ]
    if found.spec != found.costs.lora_spec:
        rows.append((f"trained by {found.costs.lora_spec}", found.costs.lora_trained, ""))
    start = "starts at W' = W, exactly" if found.starts_neutral else "starts beside W"
    return f"{aligned(rows)}\n{start}"


def _cost(found: Shown) -> str:
    costs = found.costs
    rows: list[tuple[Cell, ...]] = [
        ("multiply-adds of a forward", "a token", "of base", "once a call, in tokens of base")
    ]
    rows.append(_row("base", costs.base, costs))
    rows.append(_row(costs.lora_spec, costs.lora, costs))
    if costs.own is not None and found.spec != costs.lora_spec:
        rows.append(_row(found.spec, costs.own, costs))
    note = f"\n{found.spec} can't be counted without values: {costs.why_not}" if costs.own is None else ""
    return aligned(rows) + note


def _row(name: str, cost: Cost, costs: Costs) -> tuple[Cell, ...]:
    return (name, cost.token, f"{cost.token / costs.base.token:.4f}", f"{cost.call / costs.base.token:,.2f}")
