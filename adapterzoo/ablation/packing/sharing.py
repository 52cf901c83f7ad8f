"""What the models of several runs have in common: it stands in memory once, and runs once for all of them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from adapterzoo.ablation.packing.trees import UnpackableError
from adapterzoo.adapter import Adapter
from adapterzoo.layer import AdaptedLinear


def share(first: nn.Module, other: nn.Module) -> int:
    """Let `other` use the memory of `first` for every frozen parameter that is the same in both.

    Parameters stay the objects that they are, and what trains stays apart. Adapters are left alone.

    Returns:
        How many bytes `other` gave up.
    """
    own, freed = dict(first.named_parameters()), 0
    inside = {id(value) for module in other.modules() if isinstance(module, Adapter) for value in module.parameters()}
    for name, value in other.named_parameters():
        twin = own.get(name)
        if twin is not None and id(value) not in inside and _is_same(twin, value) and not _is_one(twin, value):
            freed += value.untyped_storage().nbytes()
            value.data = twin.data  # what layers keep of it sees that its place has changed
    return freed


def own_places(models: Sequence[nn.Module]) -> list[str]:
    """Names of the modules that every run has for itself: adapted layers, and those whose own tensors train or differ.

    A name stands for all that is below it. Everything else is shared: its tensors are frozen and the same.

    Raises:
        UnpackableError: the models are built differently, or nothing can be shared.
    """
    found = list(_walk("", models))
    if "" in found:
        raise UnpackableError(f"the outermost module, {type(models[0]).__name__}, has tensors that train or differ")
    return found


def _walk(name: str, modules: Sequence[nn.Module]) -> Iterator[str]:
    if any(isinstance(module, AdaptedLinear) for module in modules) or _differ(modules):
        yield name
        return
    children = [dict(module.named_children()) for module in modules]
    if any(list(each) != list(children[0]) for each in children):
        raise UnpackableError(
            f"the models of different runs have different parts in {name or 'their outermost module'}"
        )
    for part in children[0]:
        yield from _walk(f"{name}.{part}" if name else part, [each[part] for each in children])


def _differ(modules: Sequence[nn.Module]) -> bool:
    """Whether something that the modules hold themselves trains, or is not the same in all of them."""
    first, tables = modules[0], [{**module._parameters, **module._buffers} for module in modules]
    if any(
        type(module) is not type(first) or set(table) != set(tables[0])
        for module, table in zip(modules, tables, strict=True)
    ):
        return True
    return any(not _is_common([table[name] for table in tables]) for name in tables[0])


def _is_common(values: Sequence[Tensor | None]) -> bool:
    first = values[0]
    if first is None or any(value is None for value in values):
        return all(value is None for value in values)
    return all(value is not None and _is_same(first, value) for value in values)


def _is_same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are frozen, ordinary, and equal in all that counts."""
    if left.requires_grad or right.requires_grad:
        return False
    if _is_one(left, right):
        return True
    plain = type(left) in (Tensor, nn.Parameter) and type(right) in (Tensor, nn.Parameter)
    alike = (left.dtype, left.device, left.shape) == (right.dtype, right.device, right.shape)
    return plain and alike and bool(torch.equal(left, right))


def _is_one(left: Tensor, right: Tensor) -> bool:
    return left is right or (left.data_ptr() == right.data_ptr() != 0 and left.shape == right.shape)
