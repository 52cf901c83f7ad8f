"""Parameters that several processes hold in shards (FSDP2's DTensors), as whole tensors and back."""

from typing import Any

from torch import Tensor


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
    from torch.distributed.tensor import distribute_tensor  # heavy, and only there where DTensors are

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]
