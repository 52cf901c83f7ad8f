"""Exact counts of a step: operations of its matrix products, and bytes that its forward leaves behind.

Nothing here is timed, so the figures are the same on every machine. `counted_check` holds each counter to cases whose
answer is known by hand. Needs torch alone.
"""

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.products import MISSED


def flops(step: Callable[[], object]) -> int:
    """Operations (a multiply and an add are two) of every matrix product in step(), in forward and in backward.

    Elementwise work, sums, and factorisations of small matrices are not counted, on any side.
    """
    with FlopCounterMode(display=False, custom_mapping=MISSED) as counter:
        step()
    return int(counter.get_total_flops())


def alive_bytes(forward: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes made during forward() that are still alive after it has returned, wherever they are kept.

    Saved tensors, attributes of an autograd context, masks, caches, closures and reference cycles all count, each
    storage once and in full, however small the view that keeps it. What is returned does not count, nor does what was
    there before (a cache from an earlier call), nor the storages of `exclude`.

    Args:
        forward: what to run; what it returns is kept alive until all is counted.
        exclude: further tensors that do not count, such as the input and the parameters.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        with _Creations() as made:
            result = forward()
        free = {_identity(tensor) for tensor in _tensors([result, list(exclude)])}
        return sum(_living(ref) for key, ref in made.found.items() if key not in free)
    finally:
        if enabled:
            gc.enable()


def saved_bytes(forward: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of the tensors that autograd has saved for backward when forward() has returned, each storage once.

    What is kept by other ways than `save_for_backward` escapes it; `alive_bytes` sees that too. What forward returns
    counts here if it was saved.

    Args:
        forward: what to run; what it returns is kept alive until all is counted.
        exclude: tensors whose storages do not count, such as the input and the parameters.
    """
    free = {_identity(tensor) for tensor in _tensors(list(exclude))}
    saved: dict[int, StorageWeakRef] = {}

    def pack(tensor: Tensor) -> Tensor:
        for part in _tensors(tensor):
            if _identity(part) not in free | saved.keys():
                saved[_identity(part)] = _weak(part)
        return tensor.detach()  # the tensor itself may hold the very graph that saves it, which then never dies

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(_living(ref) for ref in saved.values())
    del result  # not before: it holds the graph, and the graph what was saved
    return total


def peak_bytes(step: Callable[[], object], device: torch.device | str) -> int:
    """The most bytes that step() had allocated at a time on a CUDA device, beyond what was there before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class _Creations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Weak references to every storage that an operation made: one that is in its result, and in no argument of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # torch.tensor([...]) shows itself only as a lift of a tensor that it made unseen.
        given = set() if func in _LIFTS else {_identity(tensor) for tensor in _tensors([args, kwargs])}
        for tensor in _tensors(result):
            # A weak reference keeps the address of a freed storage from being given to another one.
            if _identity(tensor) not in given and _identity(tensor) not in self.found:
                self.found[_identity(tensor)] = _weak(tensor)
        return result


_LIFTS = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default}


def _tensors(tree: object) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout is torch.strided)


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _weak(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _living(ref: StorageWeakRef) -> int:
    """Bytes of a storage as large as it is now, which may not be as it was made; 0 if it is freed."""
    storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
    return 0 if storage is None else int(storage.nbytes())
