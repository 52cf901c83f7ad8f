"""What is kept between calls: norms of a frozen weight, and factors while no gradient is wanted."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

from adapterzoo.wide import in_transform, row_norms_sq

T = TypeVar("T")
Tables = Mapping[str, Tensor | None]
State = tuple[Any, ...]


class Identity:
    """Which tensor a value belongs to.

    A weak reference to the tensor would forbid torch to swap its contents, and a strong one would keep its memory. An
    id alone goes to another tensor once this one is gone, and FSDP2 makes it so: what it gathers lives in tensors of
    its own, whose contents change without a sign. So the tensor's `__dict__` is held, too: no later tensor has it.
    """

    def __init__(self, tensor: Tensor | None) -> None:
        self._id = id(tensor)
        self._own = None if tensor is None else tensor.__dict__

    def fits(self, tensor: Tensor) -> bool:
        """Whether this is the tensor."""
        return self._id == id(tensor) and self._own is tensor.__dict__


class NormCache:
    """Norms of rows and columns of one frozen weight, kept until that weight changes.

    The cache is bound to one tensor. Another tensor (functional_call, torch.func, an unmerged copy) is computed
    and not kept; a change of the bound tensor's storage or version is seen; `bind` and `clear` are called where a
    change can't be seen (loading, moving, merging, copying). A copy or a pickle starts empty and unbound.
    """

    def __init__(self) -> None:
        self._bound: Identity | None = None
        self._kept: dict[str, tuple[State, StorageWeakRef, Tensor]] = {}

    def bind(self, weight: Tensor) -> None:
        """Keep the norms of this tensor from now on."""
        self.clear()
        self._bound = Identity(weight)

    def clear(self) -> None:
        """Forget the values; the binding stays."""
        self._kept = {}

    def see(self, weight: Tensor) -> None:
        """Forget the values of a weight that trains: fused optimisers change one and leave its `_version` as it was."""
        if weight.requires_grad:
            self.clear()

    def row_norms_sq(self, weight: Tensor, compute: Callable[[Tensor], Tensor] = row_norms_sq) -> Tensor:
        """‖w_i‖²: [out] in float64, from the cache where the weight is the bound one and has not changed.

        Args:
            weight: the weight as its layer stores it.
            compute: makes the values of it; of a matrix [out, in] if not given.
        """
        return self.get("rows", weight, compute)

    def get(self, what: str, weight: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """What `compute` makes of the weight, kept under a name where the weight is the bound one."""
        self.see(weight)
        if torch.compiler.is_compiling() or weight.requires_grad:
            return compute(weight)
        if weight.is_inference() or _is_watched() or self._bound is None or not self._bound.fits(weight):
            return compute(weight)
        table = self._kept  # read once: another thread may clear it
        kept, state = table.get(what), _state(weight)
        if kept is None or state != kept[0]:
            with torch.inference_mode(False), torch.no_grad():
                kept = table[what] = (state, _hold(weight), compute(weight))
        return kept[2]

    def __deepcopy__(self, memo: dict[int, Any]) -> "NormCache":
        return NormCache()

    def __reduce__(self) -> tuple[type["NormCache"], tuple[()]]:
        return NormCache, ()


class KeptFactors(Generic[T]):
    """What was built of some tensors, for as long as grad mode is off and none of them has changed.

    With grad mode on, everything is built anew, in evaluation too. A change is seen by identity, storage and version of
    each tensor, and at every step of any torch optimiser, since fused ones leave versions as they were; `bind` and
    `clear` are called where none of these tells (train and eval, loading, moving, merging). Nothing is kept of tensors
    that were not bound (functional_call), of inference tensors, under torch.func, while anything traces, or in the
    capture of a CUDA graph. A copy or a pickle starts empty and unbound.
    """

    def __init__(self) -> None:
        self._places: list[tuple[Tables, str]] = []
        self._bound: list[Identity] = []
        # The tensors are held, so that no other one can take the place of one of them.
        self._kept: tuple[list[Tensor], list[StorageWeakRef], tuple[int, list[State]], T] | None = None

    def bind(self, places: Iterable[tuple[Tables, str]]) -> None:
        """Forget everything; keep what is built of the tensors in these places (a table of a module, a name)."""
        self._kept, self._places = None, list(places)
        self._bound = [Identity(table.get(name)) for table, name in self._places]

    def clear(self) -> None:
        """Forget everything; the binding stays."""
        self._kept = None

    def are_given(self) -> bool:
        """Whether the bound places hold no parameters: torch.func puts plain tensors there for the time of a call.

        (Transformers' from_pretrained puts other parameters there for good, and nobody knows which of them a file had.)
        """
        return not any(isinstance(table.get(name), Parameter) for table, name in self._places)

    def get(self, build: Callable[[], T]) -> T:
        """What `build` makes of the tensors in the bound places, or made of them before."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or _is_watched():
            return build()
        tensors = [table.get(name) for table, name in self._places]
        kept, steps = self._kept, _STEPS.seen()  # read once: another thread may clear it
        if kept is not None and all(map(_same, tensors, kept[0])) and kept[2] == (steps, list(map(_state, kept[0]))):
            return kept[3]
        own = [tensor for tensor in tensors if tensor is not None and not tensor.is_inference()]
        if len(own) != len(self._bound) or not all(map(Identity.fits, self._bound, own)):
            return build()
        states = list(map(_state, own))
        with torch.inference_mode(False), torch.no_grad():
            value = build()
        self._kept = (own, list(map(_hold, own)), (steps, states), value)
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptFactors[T]":
        return KeptFactors()

    def __reduce__(self) -> tuple[type["KeptFactors[T]"], tuple[()]]:
        return KeptFactors, ()


class _Steps:
    """Counts the steps that any torch optimiser of the process takes, from the first time that anyone asks."""

    def __init__(self) -> None:
        self._count, self._hooked = 0, False

    def seen(self) -> int:
        """A number that differs from the last one if an optimiser has stepped since."""
        if not self._hooked:
            register_optimizer_step_post_hook(self._note)
            self._hooked = True
        return self._count

    def _note(self, *arguments: Any) -> None:
        self._count += 1


_STEPS = _Steps()


def _state(tensor: Tensor) -> State:
    """What differs after a change that can be seen; no state equals one in the capture of a CUDA graph."""
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return (object(),)
    return (tensor.untyped_storage()._cdata, tensor.data_ptr(), tensor._version)


def _hold(tensor: Tensor) -> StorageWeakRef:
    """Keep the identity of a tensor's storage from being given to another one, but not its memory."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _same(left: Tensor | None, right: Tensor | None) -> bool:
    return left is right


def _is_watched() -> bool:
    """Whether someone transforms, traces or counts what runs: fake tensors, make_fx, torch.func, torch.jit."""
    return in_transform() or bool(torch._C._len_torch_dispatch_stack()) or bool(torch._C._is_tracing())
