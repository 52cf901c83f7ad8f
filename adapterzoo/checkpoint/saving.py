"""Writing: `save`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from adapterzoo.checkpoint.contradictions import contradictions
from adapterzoo.checkpoint.describe import Described, described, device_of_shards
from adapterzoo.checkpoint.inspection import Contents
from adapterzoo.checkpoint.inventory import Inventory, digest_of
from adapterzoo.checkpoint.manifest import (
    ADAPTER_NAME,
    AdapterEntry,
    BaseEntry,
    Manifest,
    digest_of_description,
)
from adapterzoo.checkpoint.reading import library_version, manifest_in
from adapterzoo.checkpoint.storage import MANIFEST, TensorFile, remove_stale, write_manifest, write_tensors
from adapterzoo.checkpoint.strict_json import dumps
from adapterzoo.checkpoint.wording import shown, telling
from adapterzoo.errors import CheckpointError


@torch.no_grad()
def save(
    model: nn.Module, directory: str | Path, *, name: str = "default", max_shard_bytes: int = 5_000_000_000
) -> Contents:
    """Save the adapters of a model, and whatever else trains in it, into a directory.

    The directory gets one `adapterzoo.json`, which describes everything, and safetensors files. A crash at any moment
    leaves what was saved there before, or the new save, whole. The model is not changed, and may be merged: what is
    saved of it is the same. Frozen parameters of the base are not saved, only their names and shapes.

    Args:
        model: a model with adapted layers. Where several processes hold it in shards (FSDP2) all of them call this,
            and rank 0 writes; under DistributedDataParallel call it in one process.
        directory: where; it is made if it is not there. One save at a time.
        name: the name of the adapter; adapters of the same base that were saved under other names stay.
        max_shard_bytes: the most bytes of tensors in one file.

    Returns:
        What the directory holds now; `print` shows it.

    Raises:
        CheckpointError: no adapted layer; values on the meta device or in a dtype that no file holds; a piece that is
            not registered; a directory that can't be written, or that holds what this would destroy. Nothing was
            changed.

    Example:
        >>> import tempfile, torch
        >>> from adapterzoo import LoRA, adapt, save
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> plan = adapt(model, LoRA(r=2), targets=["0"], train=["2"])
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     print(str(save(model, directory)).split("adapter ")[1])
        'default': 1 layer, 116 numbers in 1 file
          LoRA(r=2) on 0
          besides adapters: 2.weight [4, 16], 2.bias [4]
    """
    _check_arguments(name, max_shard_bytes)
    inventory = Inventory(model)
    content = described(inventory)
    path = Path(directory).expanduser()
    device = device_of_shards(inventory)
    if device is None:
        return _write(path, name, inventory, content, max_shard_bytes)
    return _together(path, lambda: _write(path, name, inventory, content, max_shard_bytes), device)


def _check_arguments(name: str, max_shard_bytes: int) -> None:
    if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
        raise CheckpointError(f"name={name!r} is not valid: letters, digits, _, . and -, at most 64, as in 'default'")
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes!r} is not valid: it should be a whole number ≥ 1")


def _write(path: Path, name: str, inventory: Inventory, content: Described, most: int) -> Contents:
    with _telling(path):
        path.mkdir(parents=True, exist_ok=True)
    before = manifest_in(path) if (path / MANIFEST).exists() else None
    base = _base(inventory)
    others = _others(path, before, name, base)
    with _telling(path), _swept(path):
        files = write_tensors(path, content.tensors, most)
        adapters = dict(sorted({**others, name: _adapter(content, files)}.items()))
        manifest = _signed(base, adapters)
        _check_readable(manifest)
        write_manifest(path, dumps(manifest.tree()))
    remove_stale(path, manifest.files())
    return Contents(path, manifest)


def _signed(base: BaseEntry, adapters: dict[str, AdapterEntry]) -> Manifest:
    """The description, with its own digest."""
    bare = Manifest(
        format="adapterzoo",
        format_version=1,
        library_version=library_version(),
        digest="0" * 64,
        base=base,
        adapters=adapters,
    )
    return bare.model_copy(update={"digest": digest_of_description(bare.tree())})


def _check_readable(manifest: Manifest) -> None:
    """Never put in place what `load` would refuse."""
    problems = contradictions(manifest)
    if problems:
        raise CheckpointError("what was to be saved could not be read again, so nothing was written", problems)


def _telling(path: Path) -> AbstractContextManager[None]:
    return telling(f"{shown(path)} can't be written, and what was saved there before is whole")


@contextmanager
def _swept(path: Path) -> Iterator[None]:
    """Where the body fails, remove what no description in place names."""
    try:
        yield
    except BaseException:
        with suppress(CheckpointError, OSError):
            remove_stale(path, manifest_in(path).files() if (path / MANIFEST).exists() else ())
        raise


def _base(inventory: Inventory) -> BaseEntry:
    shapes = inventory.shapes
    return BaseEntry(**{"class": inventory.kind}, digest=digest_of(shapes), parameters=shapes)


def _others(path: Path, before: Manifest | None, name: str, base: BaseEntry) -> dict[str, AdapterEntry]:
    """The adapters of other names, which stay."""
    others = {} if before is None else {key: entry for key, entry in before.adapters.items() if key != name}
    if before is not None and others and before.base.digest != base.digest:
        raise CheckpointError(
            f"{shown(path)} holds {', '.join(map(repr, others))} of another base, a {before.base.class_name}; "
            "save this one into another directory"
        )
    return others


def _adapter(content: Described, files: list[TensorFile]) -> AdapterEntry:
    """The description of the adapter, with the file of every tensor."""
    place = {key: {"file": file.name} for file in files for key in file.keys}
    layers = [
        layer.model_copy(
            update={
                "tensors": {n: t.model_copy(update=place[t.same_as or layer.key(n)]) for n, t in layer.tensors.items()}
            }
        )
        for layer in content.layers
    ]
    return AdapterEntry(
        compositions=content.compositions,
        layers=layers,
        trained=[entry.model_copy(update=place[entry.names[0]]) for entry in content.trained],
        files={file.name: file.entry for file in files},
    )


def _together(path: Path, write: Callable[[], Contents], device: str) -> Contents:
    """Rank 0 writes, the others wait for it; where it fails, all fail."""
    failure: BaseException | None = None
    try:
        contents = write() if torch.distributed.get_rank() == 0 else None
    except BaseException as error:
        failure = error
    failed = torch.tensor([failure is not None], dtype=torch.int32, device=device)
    torch.distributed.all_reduce(failed)
    if failure is not None:
        raise failure
    if bool(failed):
        raise CheckpointError(f"rank 0 could not write {shown(path)}; what was saved there before is whole")
    return contents or Contents(path, manifest_in(path))
