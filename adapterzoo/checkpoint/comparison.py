"""A description against a model: everything that differs, one sentence each, with the nearest names."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from adapterzoo.checkpoint.describe import dtype_name, values_by_name
from adapterzoo.checkpoint.inventory import Kept
from adapterzoo.checkpoint.manifest import BaseEntry, LayerEntry, TrainedEntry
from adapterzoo.checkpoint.wording import short
from adapterzoo.errors import did_you_mean, where
from adapterzoo.layer import AdaptedLinear
from adapterzoo.pieces import Piece
from adapterzoo.sharded import is_sharded

_HINTS = 20  # nearest names are looked for this many times; further ones would be the same story


def base_differences(base: BaseEntry, kind: str, shapes: Mapping[str, list[int]], strict: bool) -> list[str]:
    """How the parameters of a model differ from those of the base that was saved; [] if they don't.

    Args:
        base: the base in the file.
        kind: the model's class.
        shapes: the shape of every parameter of the model's base, by name.
        strict: False allows parameters that only one of the two has.
    """
    there, near = base.parameters, _nearest(shapes)
    differ = [
        f"parameter {short(name)} has the shape {list(shapes[name])} here and {there[name]} in the file"
        for name in there
        if name in shapes and list(shapes[name]) != there[name]
    ]
    missing = [f"the model has no parameter {short(n)} {there[n]}{near(n)}" for n in there if n not in shapes]
    extra = [f"the file knows no parameter {short(n)} {list(shapes[n])}" for n in shapes if n not in there]
    problems = [*differ, *(missing + extra if strict else [])]
    other = f"{short(base.class_name)} there, {kind} here" if base.class_name != kind else f"another {kind}"
    return [f"the file is of another base: {other}", *problems] if problems else []


def missing_layers(wanted: Iterable[str], known: Iterable[str]) -> list[str]:
    """The layers of a file that a model does not have at all, as sentences."""
    known = set(known)
    near = _nearest(known)
    return [f"the model has no layer {short(name)}{near(name)}" for name in wanted if name not in known]


def layer_differences(
    entry: LayerEntry, spec: Piece, layer: AdaptedLinear, names: Sequence[str], cast: bool
) -> Iterator[str]:
    """Why the values of a layer in a file don't fit an adapted layer.

    Args:
        entry: the layer in the file.
        spec: its spec.
        layer: the layer of the model.
        names: every name that it has there.
        cast: whether dtypes may differ.
    """
    what = where(entry.names[0])
    if list(names) != entry.names:
        yield f"{what} is known as {', '.join(map(short, entry.names))} in the file, here as {', '.join(names)}"
    there, here = _form(entry.matrix, entry.kernel), _form(layer.shape[:2], layer.shape.kernel)
    if here != there:
        yield f"{what} has W {here} here and {there} in the file"
    if layer.merged:
        yield f"{what} is merged and takes no values; unmerge it before loading"
    if layer.spec != spec:
        yield f"{what} is {layer.spec!r} here and {spec!r} in the file: another composition"
    else:
        yield from _value_differences(entry, layer, cast)


def trained_differences(entry: TrainedEntry, item: Kept | None, cast: bool) -> Iterator[str]:
    """Why a trained parameter of a file, or a buffer, does not fit the one that the model has under its names."""
    what = f"{entry.what} {short(entry.names[0])}"
    if item is None:
        yield f"{what} is none of the model's"
        return
    if set(item.names) != set(entry.names):
        yield f"{what} is shared as {', '.join(map(short, entry.names))} in the file, here as {', '.join(item.names)}"
    value = item.value
    if isinstance(item.owner, AdaptedLinear) and item.owner.merged:
        yield f"{what} belongs to a merged layer; unmerge it before loading"
    yield from _tensor_differences(what, entry.shape, entry.dtype, value, list(value.shape), cast)


def _value_differences(entry: LayerEntry, layer: AdaptedLinear, cast: bool) -> Iterator[str]:
    what, own = where(entry.names[0]), values_by_name(layer)
    near = _nearest(own)
    for name in sorted(entry.tensors.keys() - own.keys()):
        yield f"{what} has no value {short(name)}, which the file has{near(name)}"
    for name in sorted(own.keys() - entry.tensors.keys()):
        yield f"{what} needs a value {name!r}, which the file has not"
    expected = _expected_shapes(entry, layer)
    for name in sorted(own.keys() & entry.tensors.keys()):
        part, key = own[name]
        there = entry.tensors[name]
        if there.role != str(part.roles[key]):
            yield f"{what}, {name}: its role is {str(part.roles[key])!r} here and {short(there.role)} in the file"
        value = part.values()[key]
        yield from _tensor_differences(f"{what}, {name}", there.shape, there.dtype, value, expected[name], cast)


def _tensor_differences(
    what: str, shape: list[int], dtype: str, value: torch.Tensor, expected: list[int], cast: bool
) -> Iterator[str]:
    if shape != expected:
        yield f"{what} has the shape {expected} here and {shape} in the file"
    if dtype != dtype_name(value.dtype) and not cast:
        yield f"{what} is {dtype_name(value.dtype)} here and {dtype} in the file; cast=True converts it"
    if value.is_meta:
        yield f"{what} is on the meta device; materialise the model first (model.to_empty(device=...))"
    elif value.is_inference():
        yield f"{what} was made in torch.inference_mode(), where values are written only once"


def _expected_shapes(entry: LayerEntry, layer: AdaptedLinear) -> dict[str, list[int]]:
    """The shape that every value has to have: the layer's own, at the rank of the file where ranks can be removed."""
    shapes = {}
    for name, (part, key) in values_by_name(layer).items():
        shape, axis = list(part.values()[key].shape), part.spec.rank_axes.get(key)
        if axis is not None and not is_sharded(part.values()[key]):
            shape[axis] = _rank_in_file(entry, name, key, part.spec, part._full_rank or 0, shape[axis])
        shapes[name] = shape
    return shapes


def _rank_in_file(entry: LayerEntry, name: str, key: str, spec: Piece, full: int, now: int) -> int:
    """The one rank that the file gives to all of a part's values, at most the full one; else the rank of the layer."""
    prefix = name.removesuffix(key)
    sizes = {
        entry.tensors[prefix + other].shape[axis]
        for other, axis in spec.rank_axes.items()
        if prefix + other in entry.tensors and axis < len(entry.tensors[prefix + other].shape)
    }
    return sizes.pop() if len(sizes) == 1 and max(sizes) <= full else now


def _nearest(known: Iterable[str]) -> Callable[[str], str]:
    left = iter(range(_HINTS))
    return lambda name: did_you_mean(name[:200], known) if next(left, None) is not None else ""


def _form(matrix: Sequence[int], kernel: Sequence[int]) -> str:
    return f"{list(matrix)}" + (f" with a kernel {list(kernel)}" if kernel else "")
