"""What a count says: every adapted layer, groups of like ones, totals, shares and bytes; as text, CSV and JSON."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from adapterzoo.analysis.tables import Cell, aligned, as_csv, in_bytes
from adapterzoo.pieces import Piece


@dataclass(frozen=True)
class LayerCount:
    """One adapted layer: its name, its spec, (out, in) of its weight as a matrix, and its adapter's parameters."""

    name: str
    spec: Piece
    shape: tuple[int, int]
    parameters: int


@dataclass(frozen=True)
class Group:
    """Layers that differ by a number in their names alone.

    Args:
        label: the tail of their names that tells them from other groups; the whole name of a single layer.
        number: how many they are.
        spec: their spec.
        shape: (out, in) of each weight as a matrix.
        each: parameters of each adapter.
    """

    label: str
    number: int
    spec: Piece
    shape: tuple[int, int]
    each: int

    @property
    def parameters(self) -> int:
        """Parameters of all their adapters."""
        return self.number * self.each


@dataclass(frozen=True)
class Count:
    """What an adapted model comes to; `print(count)` shows it.

    Args:
        model: its name, or its class.
        kind: its class.
        dtype: the dtype of the base; several, if it has several.
        layers: the adapted layers.
        base_parameters: parameters of the model without its adapters, each tied weight once.
        trainable_parameters: parameters that train: the adapters', and those that `train=[...]` names.
        base_bytes: what the base's parameters take, in their own dtypes.
        adapter_bytes: what the adapters take as they are saved, AdaLoRA's masks included.
        gradient_bytes: what the gradients of all that trains take.
        per_layer: show every layer instead of groups of layers.
    """

    model: str
    kind: str
    dtype: str
    layers: tuple[LayerCount, ...]
    base_parameters: int
    trainable_parameters: int
    base_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    per_layer: bool = False

    @property
    def adapter_parameters(self) -> int:
        """Parameters of all adapters."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def total_parameters(self) -> int:
        """Parameters of the model with its adapters."""
        return self.base_parameters + self.adapter_parameters

    @property
    def optimiser_bytes(self) -> int:
        """What Adam keeps: two numbers for each that trains, in its own dtype."""
        return 2 * self.gradient_bytes

    @property
    def share(self) -> float:
        """Trainable parameters over all parameters, adapters included: what PEFT prints, and papers as Params (%)."""
        return self.trainable_parameters / max(1, self.total_parameters)

    @property
    def share_of_base(self) -> float:
        """Trainable parameters over those of the base."""
        return self.trainable_parameters / max(1, self.base_parameters)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The layers in groups of like ones, in the order of the model."""
        alike: dict[tuple[str, Piece, tuple[int, int], int], list[str]] = {}
        for layer in self.layers:
            alike.setdefault((_pattern(layer.name), layer.spec, layer.shape, layer.parameters), []).append(layer.name)
        patterns = {pattern for pattern, *_ in alike}
        return tuple(
            Group(names[0] if len(names) == 1 else _label(pattern, patterns), len(names), spec, shape, each)
            for (pattern, spec, shape, each), names in alike.items()
        )

    def rows(self) -> list[tuple[Cell, ...]]:
        """A header, and a row for every group; for every layer with `per_layer`."""
        if self.per_layer:
            header: tuple[Cell, ...] = ("layer", "spec", "out", "in", "parameters")
            return [header, *((one.name, repr(one.spec), *one.shape, one.parameters) for one in self.layers)]
        groups = ((g.label, repr(g.spec), g.number, *g.shape, g.each, g.parameters) for g in self.groups)
        return [("layers", "spec", "number", "out", "in", "each", "parameters"), *groups]

    def to_csv(self) -> str:
        """The rows as CSV."""
        return as_csv(self.rows())

    def to_json(self) -> str:
        """Everything as JSON: totals, shares (as fractions), bytes, and the rows by their headers."""
        header, *rows = self.rows()
        totals = ("model", "kind", "dtype", "base_parameters", "adapter_parameters", "trainable_parameters",
                  "total_parameters", "share", "share_of_base", "base_bytes", "adapter_bytes", "gradient_bytes",
                  "optimiser_bytes")  # fmt: skip
        tree = {name: getattr(self, name) for name in totals}
        tree["layers" if self.per_layer else "groups"] = [dict(zip(header, row, strict=True)) for row in rows]
        return json.dumps(tree, indent=2)

    def __str__(self) -> str:
        return "\n\n".join([self._title(), self._table(), self._totals(), self._shares()])

    def _title(self) -> str:
        specs = dict.fromkeys(repr(layer.spec) for layer in self.layers)
        model = self.kind if self.model == self.kind else f"{self.model}, {self.kind}"
        return f"{model} in {self.dtype}, with {next(iter(specs)) if len(specs) == 1 else f'{len(specs)} specs'}"

    def _table(self) -> str:
        """The rows, (out, in) in one column, and without specs where there is one for all."""
        header, *rows = self.rows()
        several = len({layer.spec for layer in self.layers}) > 1
        place = header.index("out")
        texts = [[*row[:place], f"{row[place]} x {row[place + 1]}", *row[place + 2 :]] for row in (header, *rows)]
        texts[0][place] = "out x in"
        spec = header.index("spec")
        shown = texts if several else [[*row[:spec], *row[spec + 1 :]] for row in texts]
        return aligned(shown, left=1 + several)

    def _totals(self) -> str:
        trains = self.trainable_parameters
        return aligned(
            [
                ("", "parameters", "bytes"),
                ("base", self.base_parameters, in_bytes(self.base_bytes)),
                ("adapters", self.adapter_parameters, in_bytes(self.adapter_bytes)),
                ("trainable, its gradients", trains, in_bytes(self.gradient_bytes)),
                ("Adam's two states", 2 * trains, in_bytes(self.optimiser_bytes)),
            ]
        )

    def _shares(self) -> str:
        return (
            f"{self.share:.4%} of the model with its adapters trains (what papers print as Params), "
            f"{self.share_of_base:.4%} of the base"
        )


def _pattern(name: str) -> str:
    """A name with a star for every number that is a part of it: layers.*.q_proj."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _label(pattern: str, patterns: Iterable[str]) -> str:
    """The shortest tail of a pattern that no other one has: q_proj."""
    parts = pattern.split(".")
    tails = (".".join(parts[start:]) for start in range(len(parts) - 1, 0, -1))
    others = [other for other in patterns if other != pattern]
    return next((t for t in tails if t != "*" and not any(o == t or o.endswith("." + t) for o in others)), pattern)
