"""From a model to the description of its adapter, and the tensors that go with it."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterzoo.adapter import Adapter
from adapterzoo.checkpoint.inventory import Inventory, Kept
from adapterzoo.checkpoint.manifest import LayerEntry, TrainedEntry, ValueEntry
from adapterzoo.errors import AdapterError, CheckpointError, NotFiniteWarning, listing, where
from adapterzoo.layer import AdaptedLinear
from adapterzoo.pieces import Role
from adapterzoo.registry import to_json
from adapterzoo.sharded import gathered, is_sharded

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
    )
}  # fmt: skip
"""The dtypes that a file can hold, by torch's names for them."""


@dataclass(frozen=True)
class Described:
    """An adapter as data, but for the files that its tensors will lie in: those are named "" so far."""

    compositions: list[dict[str, object]]
    layers: list[LayerEntry]
    trained: list[TrainedEntry]
    tensors: dict[str, Tensor]
    """Every tensor by its key, whole."""


def described(inventory: Inventory) -> Described:
    """Describe the adapter of a model.

    Raises:
        CheckpointError: nothing is adapted, or values that no file can hold, all at once.
    """
    if not inventory.layers:
        raise CheckpointError(f"this {inventory.kind} has no adapted layer, so there is no adapter to be saved")
    _check(inventory)
    specs: dict[str, int] = {}
    layers, tensors = [], {}
    owners: dict[int, str] = {}
    for name, layer in inventory.layers.items():
        entry = _layer(layer, inventory.names_of(name), specs.setdefault(_as_json(layer), len(specs)), owners)
        layers.append(entry)
        own = {key: value for key, value in layer.adapter.state_dict().items() if entry.tensors[key].same_as is None}
        tensors.update({entry.key(key): gathered(value.detach()) for key, value in own.items()})
    trained = [_trained(item) for item in inventory.trained]
    tensors.update({item.names[0]: gathered(item.values().detach()) for item in inventory.trained})
    _tell_what_is_not_finite(tensors)
    return Described([json.loads(text) for text in specs], layers, trained, tensors)


def values_by_name(layer: AdaptedLinear) -> dict[str, tuple[Adapter, str]]:
    """The part of an adapter, and the name there, of every value by its full name."""
    return {
        f"{'inner.' * depth}{name}": (part, name)
        for depth, part in enumerate(layer.adapter.parts())
        for name in part.roles
    }


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name for a dtype."""
    return str(dtype).removeprefix("torch.")


def _as_json(layer: AdaptedLinear) -> str:
    try:
        return to_json(layer.spec)
    except AdapterError as error:
        raise CheckpointError(f"{where(layer.name)} can't be described: {error}") from error


def _check(inventory: Inventory) -> None:
    problems = [
        f"{where(name)} has no values yet: its adapter was made on the meta device; reset_adapters(model) or load"
        for name, layer in inventory.layers.items()
        if not layer._initialised
    ]
    for item in inventory.trained:
        if item.value.is_meta:
            problems.append(f"{item.names[0]} trains and is on the meta device: it has no values")
        elif dtype_name(item.value.dtype) not in DTYPES:
            problems.append(f"{item.names[0]} trains in {item.value.dtype}, which these files can't hold")
        else:
            problems += _unreadable(item)
    if problems:
        raise CheckpointError("this model can't be saved, and nothing was written", problems)


def _unreadable(item: Kept) -> list[str]:
    """What stands in the way of its values: a base weight that trained, and that a merge has dropped."""
    try:
        item.values()
    except AdapterError as error:
        return [f"{item.names[0]}: {error}"]
    return []


def _layer(layer: AdaptedLinear, names: tuple[str, ...], composition: int, owners: dict[int, str]) -> LayerEntry:
    """The description of a layer; `owners` knows the key of every shared tensor of the layers before it, by its id."""
    own = values_by_name(layer)
    dtype = layer.adapter.factor_dtype
    entry = LayerEntry(
        names=list(names),
        composition=composition,
        kind=layer.kind,
        weight=list(layer.shape[:2] if not layer.form.is_dense else layer.weight.shape),
        matrix=list(layer.shape[:2]),
        kernel=list(layer.shape.kernel),
        seed=layer.seed,
        factor_dtype=None if dtype is None else dtype_name(dtype),
        lean=layer.lean,
        ranks=_ranks(layer),
        norms={
            name: _length_of(part.values()[short], layer)
            for name, (part, short) in own.items()
            if part.roles[short] is Role.MAGNITUDE
        },
        tensors={name: _value(part.values()[short], str(part.roles[short])) for name, (part, short) in own.items()},
    )
    shared = {name: part.values()[short] for name, (part, short) in own.items() if short in part.spec.shared}
    same = {name: owners.get(id(value)) for name, value in shared.items()}
    for name, value in shared.items():
        owners.setdefault(id(value), entry.key(name))
    tensors = {name: value.model_copy(update={"same_as": same.get(name)}) for name, value in entry.tensors.items()}
    return entry.model_copy(update={"tensors": tensors})


def _ranks(layer: AdaptedLinear) -> dict[str, int]:
    return {
        ".".join(["inner"] * depth): part.values()[next(iter(axes))].shape[next(iter(axes.values()))]
        for depth, part in enumerate(layer.adapter.parts())
        if (axes := part.spec.rank_axes)
    }


def _length_of(magnitude: Tensor, layer: AdaptedLinear) -> str:
    """In words what a magnitude is the length of."""
    if magnitude.numel() == 1 and layer.out_features > 1:
        return "the whole weight"
    axes = [axis for axis, size in zip(("rows", "columns"), layer.shape[:2], strict=True) if size == magnitude.numel()]
    return f"each of the {magnitude.numel()} {' or '.join(axes)} of W [out, in]"


def _value(value: Tensor, role: str) -> ValueEntry:
    return ValueEntry(shape=list(value.shape), dtype=dtype_name(value.dtype), role=role, file="")


def _trained(item: Kept) -> TrainedEntry:
    value = item.values()
    return TrainedEntry(
        shape=list(value.shape),
        dtype=dtype_name(value.dtype),
        file="",
        names=list(item.names),
        what="buffer" if item.what == "buffer" else "parameter",
    )


def _tell_what_is_not_finite(tensors: Mapping[str, Tensor]) -> None:
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        warnings.warn(
            f"these values are saved with NaN or infinity in them:{listing(bad)}", NotFiniteWarning, stacklevel=4
        )


def device_of_shards(inventory: Inventory) -> str | None:
    """Where several processes hold the model together, so that all of them have to save it: None if it is whole."""
    values = [item.value for item in inventory.parameters]
    values += [value for layer in inventory.layers.values() for value in layer.adapter.parameters()]
    return next((value.device.type for value in values if is_sharded(value)), None)
