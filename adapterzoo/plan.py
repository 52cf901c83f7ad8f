"""What `adapt` did to a model, readable, and a proof that every adapted layer is called."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from adapterzoo.base import WeightShape
from adapterzoo.errors import TargetError, count, listing
from adapterzoo.layer import adapted_layers
from adapterzoo.pieces import Piece, Role, layers_of


@dataclass(frozen=True)
class Adapted:
    """One adapted layer: every name it has, its spec, its shape as a matrix and its trainable parameters."""

    names: tuple[str, ...]
    spec: Piece
    shape: WeightShape
    parameters: int


@dataclass(frozen=True)
class LeftAlone:
    """One layer that was not adapted, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What was hit, what was left alone and why, and how many parameters train.

    Args:
        adapted: the adapted layers.
        left_alone: the other linear layers, and others that a class among the targets meant.
        others: classes of the other modules with parameters of their own, and how many there are.
        trained: other modules with parameters that train, such as a new head.
        total_parameters: parameters of the model with its adapters.
        trainable_parameters: those that train.
        model: the model; `verify` runs it.
    """

    adapted: tuple[Adapted, ...]
    left_alone: tuple[LeftAlone, ...]
    others: tuple[tuple[str, int], ...]
    trained: tuple[str, ...]
    total_parameters: int
    trainable_parameters: int
    model: nn.Module = field(repr=False, compare=False)

    def __str__(self) -> str:
        rows = [("layer", "spec", "out x in", "parameters")]
        rows += [
            (" = ".join(i.names), repr(i.spec), f"{i.shape[0]} x {i.shape[1]}", f"{i.parameters:,}")
            for i in self.adapted
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)),
                       *(cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=False))])
            for row in rows
        ]  # fmt: skip
        reasons = dict.fromkeys(item.reason for item in self.left_alone)
        if reasons:
            lines += [
                "",
                f"left alone: {count(len(self.left_alone), 'layer')}, frozen unless trained as they are",
            ]
            for reason in reasons:
                names = [item.name for item in self.left_alone if item.reason == reason]
                lines.append(f"  {_some(names)}: {reason}")
        if self.others:
            lines += ["", f"no linear layers: {', '.join(f'{number} {kind}' for kind, number in self.others)}"]
        if self.trained:
            lines += ["", f"trained as they are: {_some(list(self.trained))}"]
        dense = [item.names[0] for item in self.adapted if _is_dense(item.spec)]
        if dense:
            lines += ["", f"dense: {_some(dense)}: their update is a whole matrix, formed and normed as such"]
        share = self.trainable_parameters / max(1, self.total_parameters)
        lines += [
            "",
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train ({share:.3%})",
        ]
        return "\n".join(lines)

    def verify(self, example_input: Any) -> None:
        """Run the model once, in evaluation and without gradient, and prove that every adapted layer was called.

        Args:
            example_input: a tensor, a tuple of arguments, or a mapping of keyword arguments.

        Raises:
            TargetError: a layer that was not called: its adapter would change nothing and get no gradient; or there is
                no adapted layer.
        """
        layers = adapted_layers(self.model)
        if not layers:
            raise TargetError("the model has no adapted layer any more")
        called: set[int] = set()
        handles = [layer.register_forward_hook(lambda module, *_: called.add(id(module))) for layer in layers.values()]
        modes = {module: module.training for module in self.model.modules()}
        try:
            self.model.eval()
            with torch.no_grad():
                _call(self.model, example_input)
        finally:
            for handle in handles:
                handle.remove()
            for module, training in modes.items():
                module.training = training
        idle = [name for name, layer in layers.items() if id(layer) not in called]
        if idle:
            raise TargetError(f"{count(len(idle), 'adapted layer')} not called by this input:{listing(idle)}")


def _is_dense(spec: Piece) -> bool:
    return any(role is Role.UPDATE for piece in layers_of(spec) for role in piece.roles.values())


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")


def _call(model: nn.Module, example: Any) -> None:
    if isinstance(example, Mapping):
        model(**example)
    elif isinstance(example, tuple):
        model(*example)
    else:
        model(example)
