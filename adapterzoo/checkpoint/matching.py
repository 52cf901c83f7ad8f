"""Which part of a file goes to which part of a model, and everything that stands in the way."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from adapterzoo.checkpoint.comparison import layer_differences, trained_differences
from adapterzoo.checkpoint.inventory import Inventory, Kept
from adapterzoo.checkpoint.manifest import AdapterEntry, LayerEntry, TrainedEntry
from adapterzoo.checkpoint.wording import short
from adapterzoo.errors import where
from adapterzoo.layer import AdaptedLinear
from adapterzoo.pieces import Piece


@dataclass
class Match:
    """The pairs of a file's entries and a model's parts, what is left over, and what does not fit."""

    layers: list[tuple[LayerEntry, AdaptedLinear]] = field(default_factory=list)
    trained: list[tuple[TrainedEntry, Kept]] = field(default_factory=list)
    only_in_file: list[str] = field(default_factory=list)
    only_in_model: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def match(
    adapter: AdapterEntry, specs: Sequence[Piece], inventory: Inventory, *, strict: bool, cast: bool, ours: bool
) -> Match:
    """Pair an adapter of a file with an adapted model.

    Args:
        adapter: the adapter in the file.
        specs: its compositions.
        inventory: the adapted model.
        strict: whether what only one of the two has is a problem.
        cast: whether dtypes may differ.
        ours: whether the load itself has adapted the model, so that what else trained in it does not count.
    """
    found = Match()
    _match_layers(found, adapter, specs, inventory, cast)
    _match_trained(found, adapter, inventory, cast, ours)
    if strict:
        found.problems += [f"{name} is in the file and not in the model" for name in found.only_in_file]
        found.problems += [f"{name} is in the model and not in the file" for name in found.only_in_model]
    elif not found.layers and not any(entry.what == "parameter" for entry, _ in found.trained):
        found.problems.append("nothing that is in the file is in the model")
    return found


def device_problems(found: Match, device: torch.device | str | None) -> list[str]:
    """The layers that are not on the device where a user wants them."""
    if device is None:
        return []
    wanted = torch.device(device)
    targets: list[tuple[str, torch.Tensor]] = [(where(entry.names[0]), layer.weight) for entry, layer in found.layers]
    targets += [(f"{entry.what} {short(entry.names[0])}", item.value) for entry, item in found.trained]
    return [
        f"{name} is on {value.device}, not on {wanted}; move the model first, or leave out `device`"
        for name, value in targets
        if value.device.type != wanted.type or wanted.index not in (None, value.device.index)
    ]


def _match_layers(
    found: Match, adapter: AdapterEntry, specs: Sequence[Piece], inventory: Inventory, cast: bool
) -> None:
    firsts = {name: first for first in inventory.layers for name in inventory.names_of(first)}
    for entry in adapter.layers:
        first = firsts.get(entry.names[0])
        if first is None:
            found.only_in_file.append(f"the adapter of {where(short(entry.names[0])[1:-1])}")
            continue
        layer, spec = inventory.layers[first], specs[entry.composition]
        found.problems += layer_differences(entry, spec, layer, inventory.names_of(first), cast)
        found.layers.append((entry, layer))
    there = {id(layer) for _, layer in found.layers}
    found.only_in_model += [
        f"the adapter of {where(name)}" for name, layer in inventory.layers.items() if id(layer) not in there
    ]


def _match_trained(found: Match, adapter: AdapterEntry, inventory: Inventory, cast: bool, ours: bool) -> None:
    items = {(item.what, name): item for item in inventory.parameters + inventory.buffers for name in item.names}
    for entry in adapter.trained:
        item = items.get((entry.what, entry.names[0]))
        if item is None:
            found.only_in_file.append(f"{entry.what} {short(entry.names[0])}")
            continue
        found.problems += trained_differences(entry, item, cast)
        found.trained.append((entry, item))
    there = {id(item) for _, item in found.trained}
    if not ours:
        found.only_in_model += [
            f"{item.what} {item.names[0]!r}{', which trains,' if item.what == 'parameter' else ''}"
            for item in inventory.trained
            if id(item) not in there
        ]
