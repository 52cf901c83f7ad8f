"""Frozen tensors that layers share: equal ones are one tensor in memory."""

from collections import defaultdict
from weakref import ref

import torch
from torch import Tensor

_Form = tuple[torch.Size, torch.dtype, torch.device]


class Pool:
    """Tensors by what they hold. None is kept alive by it, and none is ever written to."""

    def __init__(self) -> None:
        self._known: dict[_Form, list[ref[Tensor]]] = defaultdict(list)

    def one(self, value: Tensor) -> Tensor:
        """The tensor that stands for these values: one that is there already, or this one from now on.

        Tensors on the meta device have no values and stand for themselves.
        """
        if value.is_meta or torch.compiler.is_compiling():
            return value
        form = (value.shape, value.dtype, value.device)
        alive = [known for known in self._known[form] if known() is not None]
        for known in alive:
            found = known()
            if found is value or (found is not None and torch.equal(found, value)):
                self._known[form] = alive
                return found
        self._known[form] = [*alive, ref(value)]
        return value


SHARED = Pool()
"""The pool of the process."""
