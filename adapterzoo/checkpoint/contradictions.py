"""What a description says of itself that can't all be true."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from adapterzoo.checkpoint.describe import DTYPES
from adapterzoo.checkpoint.inventory import digest_of
from adapterzoo.checkpoint.manifest import ADAPTER_NAME, TENSOR_FILE, AdapterEntry, Manifest, digest_of_description
from adapterzoo.checkpoint.wording import short
from adapterzoo.errors import AdapterError
from adapterzoo.registry import from_json

DEEPEST = 100
"""How many pieces a composition may be nested: building one takes a few of Python's frames for each."""


def contradictions(manifest: Manifest) -> list[str]:
    """Everything in a description that contradicts something else in it, or names what can't be; [] if nothing."""
    return [
        *_own(manifest),
        *_base(manifest),
        *(problem for item in manifest.adapters.items() for problem in _adapter(*item)),
    ]


def _own(manifest: Manifest) -> Iterator[str]:
    if digest_of_description(manifest.tree()) != manifest.digest:
        yield "its digest is not that of the rest: it was damaged, or changed by hand, after it was saved"


def _base(manifest: Manifest) -> Iterator[str]:
    if digest_of(manifest.base.parameters) != manifest.base.digest:
        yield "base.digest is not that of base.parameters"


def _adapter(name: str, adapter: AdapterEntry) -> Iterator[str]:
    where = f"adapter {short(name)}"
    if not ADAPTER_NAME.fullmatch(name):
        yield f"{where} has a name that is not allowed: letters, digits, _, . and -, at most 64"
    for problem in (*_files(adapter), *_names(adapter), *_specs(adapter), *_dtypes(adapter), *_shared(adapter)):
        yield f"{where}: {problem}"


def _files(adapter: AdapterEntry) -> Iterator[str]:
    for name in adapter.files:
        if not TENSOR_FILE.fullmatch(name):
            yield f"{short(name)} is no name of a tensor file: they are plain names, tensors-<hash>.safetensors"
    used = {entry.file for entry in adapter.tensors().values()}
    for name in sorted(used - adapter.files.keys()):
        yield f"tensors lie in {short(name)}, which is none of its files"
    for name in sorted(adapter.files.keys() - used):
        yield f"no tensor lies in {short(name)}"


def _names(adapter: AdapterEntry) -> Iterator[str]:
    names = [name for layer in adapter.layers for name in layer.names]
    trained = [name for entry in adapter.trained for name in entry.names]
    keys = [layer.key(name) for layer in adapter.layers for name in layer.tensors]
    keys += [entry.names[0] for entry in adapter.trained]
    for what, found in (("layer", names), ("trained parameter", trained), ("tensor", keys)):
        for name, number in Counter(found).items():
            if number > 1 and not (what == "tensor" and name in trained and trained.count(name) > 1):
                yield f"{what} {short(name)} stands there {number} times"


def _shared(adapter: AdapterEntry) -> Iterator[str]:
    """What is said to be the same tensor has to stand in a file, and to look the same."""
    stored, every = adapter.stored(), adapter.tensors()
    for key, owner in adapter.shared().items():
        if owner not in stored:
            yield f"tensor {short(key)} is said to be {short(owner)}, which stands in no file"
            continue
        own, other = every[key], stored[owner]
        if (own.shape, own.dtype, own.file) != (other.shape, other.dtype, other.file):
            yield f"tensor {short(key)} is said to be {short(owner)}, which has another shape, dtype or file"


def _specs(adapter: AdapterEntry) -> Iterator[str]:
    for layer in adapter.layers:
        if layer.composition >= len(adapter.compositions):
            yield f"layer {short(layer.names[0])} has composition {layer.composition} of {len(adapter.compositions)}"
    for i, tree in enumerate(adapter.compositions):
        if _depth(tree) > DEEPEST:
            yield f"composition {i} is nested {_depth(tree)} pieces deep; {DEEPEST} are the most that are read"
            continue
        try:
            from_json(json.dumps(tree))
        except AdapterError as error:
            yield f"composition {i} can't be read: {short(str(error), 400)}"


def _depth(tree: Any) -> int:
    depth = 0
    while isinstance(tree, dict):
        tree, depth = tree.get("inner"), depth + 1
    return depth


def _dtypes(adapter: AdapterEntry) -> Iterator[str]:
    for key, entry in adapter.tensors().items():
        if entry.dtype not in DTYPES:
            yield f"tensor {short(key)} has the dtype {short(entry.dtype)}; known are {', '.join(DTYPES)}"
    for layer in adapter.layers:
        if layer.factor_dtype not in (None, "bfloat16", "float32"):
            yield f"layer {short(layer.names[0])} has the factor_dtype {short(layer.factor_dtype)}"
