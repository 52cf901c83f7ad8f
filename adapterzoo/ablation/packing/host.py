"""One model for several runs: what they share runs once on all their examples, the rest on each run's own."""

import copy
from collections.abc import Hashable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapterzoo.ablation.packing.calls import Call
from adapterzoo.ablation.packing.sharing import own_places
from adapterzoo.ablation.packing.stacked import StackedLayer, can_stack
from adapterzoo.ablation.packing.trees import cropped, joined, parted, shapes
from adapterzoo.layer import AdaptedLinear


class _Part(NamedTuple):
    """A module, and for how many runs side by side it stands."""

    runs: int
    module: nn.Module


class _Side(nn.Module):
    """Modules of several runs in one place: each is given its own runs' part of the batch."""

    parts: list[_Part]

    def __init__(self, parts: Sequence[_Part]) -> None:
        super().__init__()
        self.__dict__["parts"] = list(parts)  # no submodules: they are the runs' own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The parts of the batch end to end, in and out."""
        if len(self.parts) == 1:
            return self.parts[0].module(*args, **kwargs)
        pieces = parted((args, kwargs), [part.runs for part in self.parts])
        own = zip(self.parts, pieces, strict=True)
        return joined([part.module(*mine, **settings) for part, (mine, settings) in own])


class Host:
    """The models of several runs as one.

    Args:
        models: one a run, in training mode, frozen parameters shared (`share`).
        stacked: compute adapters of one composition together; else each by itself.

    Raises:
        UnpackableError: they can't run as one.
    """

    def __init__(self, models: Sequence[nn.Module], stacked: bool = True) -> None:
        self.runs = len(models)
        self.filled = False
        """Whether calls were ever filled up with zeros to be of one shape."""
        self.stacks: list[StackedLayer] = []
        self._made: dict[tuple[int, ...], nn.Module] = {}
        places = own_places(models)
        rows = {place: [model.get_submodule(place) for model in models] for place in places}
        self.model = _skeleton(models[0], [row[0] for row in rows.values()])
        for place, row in rows.items():
            above, _, name = place.rpartition(".")
            setattr(self.model.get_submodule(above), name, self._side(row, stacked))
        self.model.train()

    def answer(self, calls: Sequence[Call]) -> list[Any]:
        """Run the model once on the calls of all runs."""
        joint = joined(calls, fill=True)
        self.filled = self.filled or any(shapes(call) != shapes(calls[0]) for call in calls)
        args, kwargs = joint
        outputs = parted(self.model(*args, **kwargs), [1] * self.runs)
        return [cropped(output, call, joint) for output, call in zip(outputs, calls, strict=True)]

    def hand_out(self) -> None:
        """After a backward pass: give every run's parameters their gradients."""
        for layer in self.stacks:
            layer.stack.hand_out()

    def release(self) -> None:
        """Give every run's parameters memory of their own again; the host is of no use afterwards."""
        for layer in self.stacks:
            layer.stack.release()

    def _side(self, modules: Sequence[nn.Module], stacked: bool) -> nn.Module:
        key = tuple(map(id, modules))
        if key not in self._made:  # a module that stands in two places is one in both
            groups = [list(group) for _, group in groupby(modules, _kind)]
            self._made[key] = _Side([part for group in groups for part in self._parts(group, stacked)])
        return self._made[key]

    def _parts(self, group: Sequence[nn.Module], stacked: bool) -> list[_Part]:
        layers = [module for module in group if isinstance(module, AdaptedLinear)]
        if not stacked or len(group) == 1 or len(layers) != len(group) or not can_stack(layers[0]):
            return [_Part(1, module) for module in group]
        self.stacks.append(StackedLayer(layers))
        return [_Part(len(group), self.stacks[-1])]


def _kind(module: nn.Module) -> Hashable:
    """What layers have in common that are computed together."""
    if isinstance(module, AdaptedLinear):
        return module.spec, tuple((name, value.shape) for name, value in module.adapter.state_dict().items())
    return id(module)


def _skeleton(model: nn.Module, replaced: Sequence[nn.Module]) -> nn.Module:
    """The model's modules copied, but for those that will be replaced; its tensors are the model's own."""
    kept: list[Any] = [*model.parameters(), *model.buffers(), *replaced]
    return copy.deepcopy(model, {id(item): item for item in kept})


def total(losses: Sequence[Tensor]) -> Tensor:
    """Σ_k loss_k: []. No run's gradient depends on another's loss."""
    return torch.stack(list(losses)).sum()
