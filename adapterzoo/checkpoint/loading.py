"""Reading into a model: `load`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from adapterzoo.checkpoint.adapting import adapt_as, undone_on_failure
from adapterzoo.checkpoint.comparison import base_differences, missing_layers
from adapterzoo.checkpoint.inventory import Inventory, check_is_model
from adapterzoo.checkpoint.manifest import AdapterEntry, BaseEntry
from adapterzoo.checkpoint.matching import Match, device_problems, match
from adapterzoo.checkpoint.report import LoadReport
from adapterzoo.checkpoint.specs import specs_of
from adapterzoo.checkpoint.tensors import TensorFiles, opened
from adapterzoo.checkpoint.wording import short, shown, some
from adapterzoo.errors import AdapterError, CheckpointError
from adapterzoo.layer import AdaptedLinear
from adapterzoo.pieces import Piece
from adapterzoo.sharded import sharded_like, wrapper_of_processes, write
from adapterzoo.targets import modules_by_name


@torch.inference_mode(False)
@torch.no_grad()
def load(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str = "default",
    strict: bool = True,
    adapt: bool = True,
    cast: bool = False,
    device: torch.device | str | None = None,
) -> LoadReport:
    """Load adapters, and whatever else trained, into a model.

    A model without adapters is adapted as the file says: the same layers with the same specs and seeds, the rest
    frozen but for what trained. A model with adapters has to have the same specs on the same layers, and gets the
    values. Either everything fits and is loaded, or one error lists all that does not, and nothing is changed.

    Args:
        model: the model, with the weights of the base in place. One that was adapted on the meta device is materialised
            first (`to_empty`); loading makes `reset_adapters` unnecessary.
        directory: where `save` wrote.
        name: which of the adapters in it.
        strict: False leaves out layers of the file that the model has not, and leaves alone layers of the model that
            the file has not; the report lists both. What both have still has to fit.
        adapt: False refuses a model without adapters.
        cast: True converts values whose dtype differs from the model's; otherwise that is an error.
        device: refuse unless what is loaded is on this device. Values are read straight onto the device that each layer
            is on in any case.

    Returns:
        What was done; `print` shows it.

    Raises:
        CheckpointError: everything that is wrong with the files, and everything in which they differ from the model:
            its base's parameters, its layers, their specs, shapes, dtypes and ranks. Nothing was changed.

    Example:
        >>> import tempfile, torch
        >>> from adapterzoo import LoRA, adapt, load
        >>> from adapterzoo import save
        >>> model, again = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> plan = adapt(model, LoRA(r=2))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     contents = save(model, directory)
        ...     print(load(again, directory))
        adapter 'default': 1 layer adapted and loaded
        >>> again[0].spec
        LoRA(r=2)
    """
    check_is_model(model)
    path = Path(directory).expanduser()
    with opened(path, name) as (manifest, adapter, files), undone_on_failure(model):
        specs, inventory = specs_of(adapter), Inventory(model)
        problems = _base_problems(inventory, manifest.base, adapter, strict)
        ours = not inventory.layers
        if ours:
            problems = problems or _adapted(inventory, adapter, specs, adapt, model)
            inventory = Inventory(model)
        found = match(adapter, specs, inventory, strict=strict, cast=cast, ours=ours) if inventory.layers else Match()
        problems += [*found.problems, *device_problems(found, device), *files.problems]
        if problems:
            raise CheckpointError(
                f"{shown(path)} can't be loaded into this {inventory.kind}, and nothing was changed", problems
            )
        thawed = _commit(found, files)
    return LoadReport(
        name=name,
        layers=tuple(entry.names[0] for entry, _ in found.layers),
        trained=tuple(entry.names[0] for entry, _ in found.trained),
        adapted=ours,
        thawed=() if ours else thawed,
        only_in_file=tuple(found.only_in_file),
        only_in_model=tuple(found.only_in_model),
        notes=tuple(_notes(found, manifest.base, inventory.kind)),
    )


def _base_problems(inventory: Inventory, base: BaseEntry, adapter: AdapterEntry, strict: bool) -> list[str]:
    problems = base_differences(base, inventory.kind, inventory.shapes, strict)
    return problems + (
        missing_layers([layer.names[0] for layer in adapter.layers], _modules(inventory)) if strict else []
    )


def _modules(inventory: Inventory) -> set[str]:
    """The names of all modules, and "" for a model that is itself an adapted layer."""
    names = {name for item in modules_by_name(inventory.model) for name in item.names}
    return names | ({""} if isinstance(inventory.model, AdaptedLinear) else set())


def _adapted(
    inventory: Inventory, adapter: AdapterEntry, specs: Sequence[Piece], allowed: bool, model: nn.Module
) -> list[str]:
    """Adapt a plain model as the file says; what stands in the way, [] if nothing does."""
    known = _modules(inventory)
    layers = [layer for layer in adapter.layers if layer.names[0] in known]
    if not allowed:
        return [f"this {inventory.kind} has no adapted layer, and adapt=False forbids to adapt it as the file says"]
    if wrapper_of_processes(model) is not None:
        return [f"the model is in a {wrapper_of_processes(model)} already; load (or adapt) first, then wrap it"]
    if not layers:
        return ["no layer of the file is in the model"]
    try:
        adapt_as(inventory.model, layers, specs)
    except AdapterError as error:
        return [f"it can't be adapted as the file says: {error}"]
    return []


def _commit(found: Match, files: TensorFiles) -> tuple[str, ...]:
    """Read everything, then write everything; the names of the parameters that train now and did not before."""
    values = [
        {name: files.read(entry.key(name), layer.adapter.state_dict()[name].device) for name in entry.tensors}
        for entry, layer in found.layers
    ]
    trained = [files.read(entry.names[0], item.value.device) for entry, item in found.trained]
    for (_, layer), read in zip(found.layers, values, strict=True):
        own = layer.adapter.state_dict()
        layer.load_state_dict(
            {f"adapter.{name}": sharded_like(value, own[name]) for name, value in read.items()}, False
        )
    thawed = []
    for (entry, item), value in zip(found.trained, trained, strict=True):
        write(item.value, value)
        if entry.what == "parameter" and not item.value.requires_grad:
            item.value.requires_grad_(True)
            thawed.append(entry.names[0])
    for layer in {id(layer): layer for layer in _owners(found)}.values():
        layer.refresh()
    return tuple(thawed)


def _owners(found: Match) -> list[AdaptedLinear]:
    """The adapted layers whose own weight or bias was written."""
    return [item.owner for _, item in found.trained if isinstance(item.owner, AdaptedLinear)]


def _notes(found: Match, base: BaseEntry, kind: str) -> Iterator[str]:
    if base.class_name != kind:
        yield f"the model is a {kind}, and was a {short(base.class_name)} when it was saved, with the same parameters"
    changed: dict[tuple[str, str], list[str]] = {}
    for entry, layer in found.layers:
        if entry.kind != layer.kind:
            changed.setdefault((entry.kind, layer.kind), []).append(entry.names[0])
    for (there, here), names in changed.items():
        yield f"{some(names)}: {short(there)} when saved, {here!r} here"
