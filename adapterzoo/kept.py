"""What is kept between calls: norms of a frozen weight, and factors while no gradient is wanted."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from adapterzoo.wide import in_transform, row_norms_sq

T = TypeVar("T")


class NormCache:
    """Row norms of one frozen weight, kept until that weight changes.

    The cache is bound to one tensor. Another tensor (functional_call, torch.func, an unmerged copy) is computed
    and not kept; a change of the bound tensor's storage or version is seen; `bind` and `clear` are called where a
    change can't be seen (loading, moving, merging, copying). A copy or a pickle starts empty and unbound.
    """

    def __init__(self) -> None:
        self._bound: int | None = None  # an id: a weak reference would forbid torch to swap the tensor's contents
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None

    def bind(self, weight: Tensor) -> None:
        """Keep the norms of this tensor from now on."""
        self.clear()
        self._bound = id(weight)

    def clear(self) -> None:
        """Forget the values; the binding stays."""
        self._kept = None

    def see(self, weight: Tensor) -> None:
        """Forget the values of a weight that trains: fused optimisers change one and leave its `_version` as it was."""
        if weight.requires_grad:
            self.clear()

    def row_norms_sq(self, weight: Tensor) -> Tensor:
        """‖w_i‖²: [out] in float64, from the cache where the weight is the bound one and has not changed."""
        self.see(weight)
        if weight.requires_grad or self._bound != id(weight) or not _may_keep([weight]):
            return row_norms_sq(weight)
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        kept = self._kept  # once: another thread may clear it
        if kept is None or key != kept[0]:
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept = (key, row_norms_sq(weight))
        return kept[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> "NormCache":
        return NormCache()

    def __reduce__(self) -> tuple[type["NormCache"], tuple[()]]:
        return NormCache, ()


class KeptFactors(Generic[T]):
    """What was built of some tensors, for as long as grad mode is off and none of them has changed.

    With grad mode on, everything is built anew, in evaluation too. A change is seen by identity, storage and version of
    each tensor, and at every step of any torch optimiser, since fused ones leave versions as they were; `bind` is
    called where none of these tells (train and eval, loading, moving, merging). Nothing is kept of tensors that were
    not bound (functional_call), of inference tensors, under torch.func, while anything traces, or in the capture of
    a CUDA graph. A copy or a pickle starts empty and unbound.
    """

    def __init__(self) -> None:
        self._bound: frozenset[int] = frozenset()
        # The tensors are held, so that no other one can take the place of one of them.
        self._kept: tuple[tuple[Tensor, ...], tuple[Any, ...], T] | None = None

    def bind(self, tensors: Iterable[Tensor]) -> None:
        """Forget everything; keep what is built of these tensors from now on."""
        self._kept, self._bound = None, frozenset(map(id, tensors))

    def clear(self) -> None:
        """Forget everything; the binding stays."""
        self._kept = None

    def get(self, tensors: Sequence[Tensor], build: Callable[[], T]) -> T:
        """What `build` makes of the tensors, or made of them before."""
        own = self._bound.issuperset(map(id, tensors))
        if not own or torch.is_grad_enabled() or not _may_keep(tensors):
            return build()
        state = (_STEPS.seen(), *((tensor.data_ptr(), tensor._version) for tensor in tensors))
        kept = self._kept  # once: another thread may clear it
        if kept is not None and state == kept[1] and all(map(_same, tensors, kept[0])):
            return kept[2]
        with torch.inference_mode(False), torch.no_grad():
            value = build()
        self._kept = (tuple(tensors), state, value)
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptFactors[T]":
        return KeptFactors()

    def __reduce__(self) -> tuple[type["KeptFactors[T]"], tuple[()]]:
        return KeptFactors, ()


class _Steps:
    """Counts, as far as anyone asks, the steps that any torch optimiser of the process takes."""

    def __init__(self) -> None:
        self._count, self._stepped, self._hooked = 0, False, False

    def seen(self) -> int:
        """A number that differs from the last one if an optimiser has stepped since."""
        if not self._hooked:
            register_optimizer_step_post_hook(self._note)
            self._hooked = True
        if self._stepped:
            self._count, self._stepped = self._count + 1, False
        return self._count

    def _note(self, *arguments: Any) -> None:
        # A flag and no counter: a compiled optimiser step would be compiled anew for every count that it reads.
        self._stepped = True


_STEPS = _Steps()


def _same(left: Tensor, right: Tensor) -> bool:
    return left is right


def _may_keep(tensors: Sequence[Tensor]) -> bool:
    """Whether what is computed here is an ordinary value, computed now, of tensors whose changes can be seen."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or in_transform():
        return False
    if torch._C._len_torch_dispatch_stack():  # fake tensors, make_fx, counters
        return False
    if any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing():
        return False
    return not any(tensor.is_inference() for tensor in tensors)
