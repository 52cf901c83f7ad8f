"""One frozen base under many models."""

import copy
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

T = TypeVar("T", bound=nn.Module)


def sharing_copy(model: T, own: Sequence[str] = ()) -> T:
    """A copy with parameters of its own that share their numbers with the model's: for a base that stays frozen.

    Args:
        model: what is copied; buffers are copied with their numbers.
        own: modules that get numbers of their own, such as a head that trains.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        >>> twin = sharing_copy(model, own=["1"])
        >>> [a.data_ptr() == b.data_ptr() for a, b in zip(model.parameters(), twin.parameters())]
        [True, True, False, False]
    """
    copied = {id(p) for name in own for p in model.get_submodule(name).parameters()}
    shared = [p for p in model.parameters() if id(p) not in copied]
    # What deepcopy finds in its memo it takes for the copy that was made before.
    return copy.deepcopy(model, {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in shared})
