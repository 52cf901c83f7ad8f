"""A composition on a layer, as text."""

from adapterzoo.analysis.tables import Cell, aligned
from adapterzoo.base import WeightShape
from adapterzoo.catalogue.costs import Cost
from adapterzoo.catalogue.facts import Costs, Held, PieceFacts, Shown, layers_in_words

_INDENT = "  "


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
    lines = [f"{piece.name}: {piece.what}" if piece.what else piece.name]
    lines += [_INDENT + line for text in (piece.equation, *piece.further) if text for line in text.splitlines()]
    lines += ["", *(_INDENT + line for line in _table(piece.holds).splitlines())] if piece.holds else []
    lines += ["", *(f"{_INDENT}{name:<10}  {text}" for name, text in _said(piece))]
    return "\n".join(lines)


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
        (f"trained by {found.costs.lora_spec}", found.costs.lora_trained, ""),
    ]
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
