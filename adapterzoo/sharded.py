"""Parameters that several processes hold in shards (FSDP2's DTensors), as whole tensors and back."""

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(value: Any) -> bool:
    """Whether a tensor is a DTensor: asked without importing torch.distributed."""
    return hasattr(value, "full_tensor")


def gathered(value: Tensor) -> Tensor:
    """The whole tensor, on every process; every process has to ask for it. A plain tensor is itself."""
    return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]


def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process holds, in shards as `like` is; a plain `like` leaves it whole."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor, Replicate  # heavy, and only there where DTensors are

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    whole = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=placements)  # every process cuts its own shard out: nothing is sent


def local(value: Tensor) -> Tensor:
    """What this process holds of a tensor, in its own memory: its shard, which may be empty, or all of it."""
    return value.to_local() if is_sharded(value) else value  # type: ignore[attr-defined]


@torch.no_grad()
def write(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor that every process holds, or shards, into a tensor: in place, each process its own shard."""
    if is_sharded(target):  # FSDP2 gathers from this very memory, so it must not be replaced
        value = value if is_sharded(value) else sharded_like(value, target)
    local(target).copy_(local(value))


def inside(model: nn.Module) -> nn.Module:
    """The model itself, where torch.compile or nn.DataParallel stands around it: names are the model's own."""
    own = model.module if isinstance(model, nn.DataParallel) else model._modules.get("_orig_mod")
    return model if own is None else inside(own)


def wrapper_of_processes(model: nn.Module) -> str | None:
    """The class of a wrapper around or in a model that sums up the gradients of the parameters it was made with."""
    kinds = (nn.parallel.DistributedDataParallel, getattr(_fsdp(), "FullyShardedDataParallel", ()))
    return next((type(module).__name__ for module in model.modules() if isinstance(module, kinds)), None)


def reshard(model: nn.Module) -> None:
    """Put the shards in their places where FSDP2 has left whole parameters: these are thrown away, with all changes."""
    kind = getattr(_fsdp(), "FSDPModule", ())
    for module in model.modules():
        if isinstance(module, kind):
            module.reshard()


def _fsdp() -> ModuleType | None:
    """torch's FSDP, if anyone has imported it: else nothing is sharded by it, and the import is heavy."""
    return sys.modules.get("torch.distributed.fsdp")
