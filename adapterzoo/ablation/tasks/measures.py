"""What a run measures beside its task's scores: what trains, what a step keeps, how magnitudes and ranks move."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from adapterzoo.layer import AdaptedLinear, adapted_layers
from adapterzoo.pieces import Role
from adapterzoo.training.compact import ranks


class Sizes(NamedTuple):
    """How many parameters train: those of adapters, and all others."""

    adapters: int
    others: int


def sizes(model: nn.Module) -> Sizes:
    """Count what trains.

    Example:
        >>> from adapterzoo import MAP, LoRA, adapt
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
        >>> plan = adapt(model, MAP(LoRA(r=2)), ["0"], train=["1"])
        >>> sizes(model)
        Sizes(adapters=30, others=28)
    """
    inside = {id(p): p.numel() for layer in adapted_layers(model).values() for p in _trained(layer.adapter)}
    every = {id(p): p.numel() for p in _trained(model)}
    return Sizes(sum(inside.values()), sum(every.values()) - sum(inside.values()))


class Trajectories:
    """How magnitudes and ranks move while a model trains.

    A magnitude of a single number is told as it is, as `magnitude/<its name>/<layer>`: MAP's alpha and beta. One of
    many numbers is told as `magnitude/m/<layer>`, the mean of |m| / |m at the start|, where the start is not zero;
    where a layer has several of these, as `magnitude/m.<its name>/<layer>`. Ranks that can be masked are
    `rank/<layer>`.

    Args:
        model: an adapted model before its first step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._values: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in adapted_layers(model).items():
            for label, value in _magnitudes(layer):
                self._values[f"magnitude/{label}/{name}"] = (value, value.detach().abs().clone())

    @torch.no_grad()
    def now(self) -> dict[str, float]:
        """Where they stand."""
        found = {name: _told(value, start) for name, (value, start) in self._values.items()}
        return {**found, **{f"rank/{name}": float(rank) for name, rank in ranks(self._model).items()}}


def _told(value: Tensor, start: Tensor) -> float:
    if value.numel() == 1:
        return float(value)
    some = start > 0
    return float((value.abs()[some] / start[some]).mean()) if some.any() else float(value.abs().mean())


def _magnitudes(layer: AdaptedLinear) -> Iterator[tuple[str, Tensor]]:
    found = [
        (f"{path}.{name}".lstrip("."), value)
        for path, part in zip(_paths(layer), layer.adapter.parts(), strict=True)
        for name, value in part.values().items()
        if part.roles[name] is Role.MAGNITUDE
    ]
    single = [path.rpartition(".")[2] for path, value in found if value.numel() == 1]
    many = sum(value.numel() > 1 for _, value in found)
    for path, value in found:
        own = path.rpartition(".")[2]
        if value.numel() == 1:
            yield own if single.count(own) == 1 else path, value
        else:
            yield "m" if many == 1 else f"m.{path}", value


def _paths(layer: AdaptedLinear) -> list[str]:
    """Where each part of the adapter stands in it: "", "inner", "inner.inner", ..."""
    return [".".join(["inner"] * depth) for depth in range(len(layer.adapter.parts()))]


class _Saved:
    """What autograd keeps of a tensor for its backward pass; it lives as long as the graph that needs it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # the tensor itself may hold the very graph that saves it, which then never dies


def saved_bytes(forward: Callable[[], Tensor], exclude: Iterable[Tensor]) -> tuple[Tensor, int]:
    """Run a forward pass, and count the bytes that it keeps for its backward pass, each storage once and in full.

    Args:
        forward: what to run.
        exclude: tensors whose storages don't count: parameters and buffers.

    Returns:
        What the forward gave, and the bytes.
    """
    kept: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        kept.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = forward()
    free = {part.untyped_storage()._cdata for tensor in exclude for part in _plain(tensor)}
    found = [part.untyped_storage() for saved in kept for part in _plain(saved.tensor)]
    return result, sum({storage._cdata: storage.nbytes() for storage in found if storage._cdata not in free}.values())


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the gradients, and of what the optimiser remembers."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    remembered = [value for state in optimizer.state.values() for value in tree_leaves(state)]
    return sum(_bytes(p.grad) for p in trained if p.grad is not None) + sum(
        _bytes(value) for value in remembered if isinstance(value, Tensor)
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _plain(tensor: Tensor) -> list[Tensor]:
    """A tensor with a storage of its own; those inside of a quantised one."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _plain(getattr(tensor, name))]
    return [tensor] if tensor.layout is torch.strided else []


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
