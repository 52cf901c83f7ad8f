"""The compositions that are measured, by the names that the tables use."""

from collections.abc import Callable

from adapterzoo import MAP, SORA, AdaLoRA, DoRA, FLoRA, LoRA, PreDiag
from adapterzoo.pieces import Piece

# From the inside out; six deep is DoRA(SORA(MAP(PreDiag(DoRA(MAP(LoRA)))))).
CHAIN: tuple[Callable[[Piece], Piece], ...] = (MAP, DoRA, PreDiag, MAP, SORA, DoRA)
SIX_DEEP = "six deep"


def generators(r: int, dropout: float = 0.0) -> dict[str, Piece]:
    """The generators of rank r, with dropout on the update's input."""
    return {
        "LoRA": LoRA(r=r, dropout=dropout),
        "AdaLoRA": AdaLoRA(r=r, dropout=dropout),
        "FLoRA": FLoRA(r=r, dropout=dropout),
    }


def wrapped(r: int, dropout: float = 0.0) -> dict[str, Piece]:
    """LoRA under the wrappers that are published for it, and six deep."""
    lora = LoRA(r=r, dropout=dropout)
    return {
        "MAP(LoRA)": MAP(lora),
        "DoRA(LoRA)": DoRA(lora),
        "PreDiag(LoRA)": PreDiag(lora),
        "SORA(PreDiag(LoRA))": SORA(PreDiag(lora)),
        SIX_DEEP: deep(len(CHAIN), r, dropout),
    }


def deep(depth: int, r: int, dropout: float = 0.0) -> Piece:
    """LoRA under the first `depth` wrappers of the chain."""
    spec: Piece = LoRA(r=r, dropout=dropout)
    for wrap in CHAIN[:depth]:
        spec = wrap(spec)
    return spec


def by_depth(r: int) -> dict[str, Piece]:
    """LoRA under 0 to 6 wrappers of the chain."""
    return {f"{depth} deep": deep(depth, r) for depth in range(len(CHAIN) + 1)}
