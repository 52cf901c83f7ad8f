"""How PEFT lays the numbers of an adapter out in a file: names and shapes, by kind of layer."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from adapterzoo.base import WeightShape
from adapterzoo.conditioning import DoRA
from adapterzoo.methods import AdaLoRA, LoRA
from adapterzoo.pieces import Piece

ADALORA_EPS = 1e-5
"""PEFT's AdaLoRA divides by r + 1e-5 instead of r."""


class Slot(NamedTuple):
    """Where a parameter stands in a file: what follows the module's name in its key, its shape there, and here."""

    suffix: str
    shape: tuple[int, ...]
    own: tuple[int, ...]


def slots(spec: Piece, kind: str, shape: WeightShape, rank: int) -> dict[str, Slot]:
    """The places of a composition's parameters, by their names here. Every layout is a reshape of the layout here.

    Args:
        spec: LoRA, DoRA(LoRA) or AdaLoRA.
        kind: what kind of layer it sits on.
        shape: its weight.
        rank: how many ranks the parameters have, fewer than the spec's r after pruning.
    """
    out, columns, kernel = shape
    right, left, ones = (rank, columns), (out, rank), (1,) * len(kernel)
    if isinstance(spec, AdaLoRA):
        lam = Slot("lora_E", (rank, 1), (rank,))
        return {"Q": Slot("lora_A", right, right), "P": Slot("lora_B", left, left), "lam": lam}
    if isinstance(spec, DoRA):
        magnitude = Slot("lora_magnitude_vector", (1, out, *ones) if kernel else (out,), (out,))
        return {"magnitude": magnitude, **slots(spec.inner, kind, shape, rank)}
    if kind == "embedding":
        return {"A": Slot("lora_embedding_A", right, right), "B": Slot("lora_embedding_B", left, left)}
    A = Slot("lora_A.weight", (rank, shape.in_channels, *kernel), right)
    return {"A": A, "B": Slot("lora_B.weight", (*left, *ones), left)}


def has_format(spec: Piece) -> bool:
    """Whether PEFT has a format for a composition."""
    return isinstance(spec, LoRA | AdaLoRA) or (isinstance(spec, DoRA) and isinstance(spec.inner, LoRA))


def to_file(spec: Piece, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values as PEFT has them: without masked ranks, and with singular values that make up for its divisor."""
    if not isinstance(spec, AdaLoRA):
        return dict(values)
    kept = values["mask"] != 0
    lam = (values["lam"][kept].double() * ((spec.r + ADALORA_EPS) / spec.r)).to(values["lam"].dtype)
    return {"P": values["P"][:, kept], "Q": values["Q"][kept], "lam": lam}


def from_file(spec: Piece, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_file`, where nothing was pruned; every rank that is in the file counts."""
    if not isinstance(spec, AdaLoRA):
        return dict(values)
    lam = (values["lam"].double() * (spec.r / (spec.r + ADALORA_EPS))).to(values["lam"].dtype)
    return {**values, "lam": lam, "mask": lam.new_ones(lam.shape)}
