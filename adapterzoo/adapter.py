"""The one module that holds adapter parameters: it mirrors the tree of a spec and knows no piece by name."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from adapterzoo.contract import initial_values, is_tried, made_weight, try_purity
from adapterzoo.errors import RoundedMagnitudeWarning
from adapterzoo.factored import FactoredWeight
from adapterzoo.pieces import Parameters, Piece, Role, Wrapper
from adapterzoo.sharded import gathered, is_sharded, write
from adapterzoo.shared import SHARED
from adapterzoo.site import Site

_FACTORS = frozenset({Role.INPUT_FACTOR, Role.OUTPUT_FACTOR, Role.UPDATE, Role.CORE})
_PRECISE = frozenset({Role.MAGNITUDE, Role.ROTATION})


class Adapter(nn.Module):
    """The parameters of one piece, and as `inner` the adapter of what it wraps.

    So the names of parameters follow the composition: MAP(DoRA(LoRA(r=8))) has `alpha`, `beta`, `inner.magnitude`,
    `inner.inner.A` and `inner.inner.B`.

    Args:
        spec: a generator or wrapper.
        site: the layer that it sits on.
        factor_dtype: dtype of directions and cores; the site's if None. Magnitudes and rotations have the site's.
    """

    inner: "Adapter | None"
    roles: dict[str, Role]  # of the parameters that it has: a piece may leave out some of those that it declares

    def __init__(self, spec: Piece, site: Site, factor_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.factor_dtype = factor_dtype
        self.locked = False
        self.inner = Adapter(spec.inner, site, factor_dtype) if isinstance(spec, Wrapper) else None
        initial = initial_values(spec, replace(site, depth=spec.depth))
        if not is_tried(spec, site):
            try_purity(spec, initial, self._inside(site), replace(site, depth=spec.depth))
        self.roles = {name: role for name, role in spec.roles.items() if name in initial}
        for name, value in initial.items():
            value = value.to(self._pinned_dtype(name) or value.dtype)
            if spec.roles[name] is Role.BUFFER:
                self.register_buffer(name, SHARED.one(value) if name in spec.shared else value)
            else:
                self.register_parameter(name, nn.Parameter(value))
        self._full_rank = self._rank()

    @property
    def generator(self) -> "Adapter":
        """The innermost adapter: the generator's own parameters, whatever wraps it."""
        return self if self.inner is None else self.inner.generator

    def parts(self) -> list["Adapter"]:
        """The adapter of every piece, from the outermost wrapper to the generator."""
        return [self] + ([] if self.inner is None else self.inner.parts())

    def values(self) -> dict[str, Tensor]:
        """The piece's own parameters and buffers by name: the tensors themselves."""
        return {name: self._value(name) for name in self.roles}

    def reset(self, site: Site) -> None:
        """Set every value of the composition to its initial one, in place."""
        with torch.no_grad():
            self._take_rank(None)
            for name, value in initial_values(self.spec, replace(site, depth=self.spec.depth)).items():
                if name in self.spec.shared:  # others may hold the tensor: it is never written to
                    self._buffers[name] = SHARED.one(value.to(self._value(name)))
                else:
                    write(self._value(name), value)
        if self.inner is not None:
            self.inner.reset(site)

    def weight(self, site: Site) -> FactoredWeight:
        """W' of the composition in normal form, from the parameters as they are now."""
        values = {name: gathered(self._value(name)).to(site.dtype) for name in self.roles}
        self._check_digits()
        params, site = Parameters(values), replace(site, depth=self.spec.depth)
        return made_weight(self.spec, self._inside(site), params, site)

    def _inside(self, site: Site) -> FactoredWeight | None:
        return None if self.inner is None else self.inner.weight(site)

    def places(self) -> list[tuple[Mapping[str, Tensor | None], str]]:
        """Where every parameter and buffer of the composition stands: the table of its module, and its name there."""
        inside = [] if self.inner is None else self.inner.places()
        roles = self.roles.items()
        return inside + [(self._buffers if role is Role.BUFFER else self._parameters, name) for name, role in roles]

    def _value(self, name: str) -> Tensor:
        """The piece's own parameter or buffer of that name, one of its roles."""
        value = self._parameters.get(name, self._buffers.get(name))
        assert value is not None
        return value

    def lock(self, locked: bool) -> None:
        """Refuse loaded values while the layer is merged."""
        self.locked = locked
        if self.inner is not None:
            self.inner.lock(locked)

    def _check_digits(self) -> None:
        """Warn where magnitudes or rotations come in 16 bits, which only FSDP2's gathering (or a user's hand) does."""
        short = [n for n, role in self.roles.items() if role in _PRECISE and self._value(n).dtype.itemsize < 4]
        if short and not torch.compiler.is_compiling():
            warnings.warn(
                f"{', '.join(short)} of {type(self.spec).__name__} reach the forward in {self._value(short[0]).dtype}, "
                "so small changes of them are lost. MixedPrecisionPolicy(param_dtype=...) of FSDP2 rounds what trains "
                "too: leave it out, and cast the base instead (model.to(torch.bfloat16) keeps adapters in float32)",
                RoundedMagnitudeWarning,
                stacklevel=2,
            )

    def _pinned_dtype(self, name: str) -> torch.dtype | None:
        return self.factor_dtype if self.spec.roles[name] in _FACTORS else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as every module moves, but never below float32: `.half()` moves the base, not what trains."""
        pinned = {id(value) for name in self.roles if self._pinned_dtype(name) for value in self._value_and_grad(name)}

        def keep_precision(value: Tensor) -> Tensor:
            moved = fn(value)
            if not value.is_floating_point() or moved.dtype == value.dtype:
                return moved
            if id(value) in pinned:
                return value.to(moved.device)
            return value.to(moved.device, torch.promote_types(moved.dtype, torch.float32))

        for child in self.children():
            child._apply(fn)  # type: ignore[no-untyped-call]
        had_values = not any(self._value(name).is_meta for name in self.spec.shared)
        super()._apply(keep_precision, recurse=False)  # type: ignore[no-untyped-call]
        if had_values:  # else what came off the meta device is blank, and will be written to
            self._share()
        return self

    def _share(self) -> None:
        """Hold shared values as the one tensor that stands for them."""
        for name in self.spec.shared:
            self._buffers[name] = SHARED.one(self._value(name))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        if self.locked:
            if not errors:  # else the layer has said it
                errors.append("this adapter belongs to a merged layer and takes no values; unmerge it first")
            return
        self._take_rank({name: state_dict.get(prefix + name) for name in self.spec.rank_axes})
        self._take_shared({name: state_dict.get(prefix + name) for name in self.spec.shared})
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        for name in self.roles:  # a file loaded with assign=True brings its own dtypes
            value = self._value(name)
            self._set_dtype(name, value, self._pinned_dtype(name) or torch.promote_types(value.dtype, torch.float32))
        self._share()

    def _take_shared(self, loaded: Mapping[str, Any]) -> None:
        """Make room of its own for loaded values that differ: others may hold the tensor that is here."""
        for name, value in loaded.items():
            own = self._value(name)
            if isinstance(value, Tensor) and value.shape == own.shape and not own.is_meta:
                self._buffers[name] = SHARED.one(value.detach().to(own, copy=True))

    def _set_dtype(self, name: str, value: Tensor, dtype: torch.dtype) -> None:
        if not is_sharded(value):
            value.data = value.data.to(dtype)
        elif value.dtype is not dtype:  # the data of a DTensor can't be replaced; FSDP2 takes a new one after a load
            setattr(self, name, nn.Parameter(value.detach().to(dtype), value.requires_grad))

    def _rank(self) -> int | None:
        """How many ranks the parameters have now; None if they can't be removed."""
        return next((self._value(name).shape[axis] for name, axis in self.spec.rank_axes.items()), None)

    def _take_rank(self, loaded: Mapping[str, Any] | None) -> None:
        """Give the parameters the rank of loaded values, which may have been compacted; the full rank without any."""
        axes = self.spec.rank_axes
        wanted = {self._full_rank} if loaded is None else {_size(loaded[name], axis) for name, axis in axes.items()}
        rank = wanted.pop() if len(wanted) == 1 else None
        if rank is None or self._full_rank is None or rank > self._full_rank or rank == self._rank():
            return  # values that don't fit at all are torch's to report
        if any(is_sharded(self._value(name)) for name in axes):
            return  # what holds the shards knows one shape; torch reports the other
        for name, axis in axes.items():
            value = self._value(name)
            shape = [rank if i == axis else size for i, size in enumerate(value.shape)]
            reshape(value, value.detach().new_zeros(shape), None)

    def _value_and_grad(self, name: str) -> list[Tensor]:
        value = self._value(name)
        return [value] if value.grad is None else [value, value.grad]

    def extra_repr(self) -> str:
        """The piece and the shapes of its own parameters."""
        shapes = ", ".join(f"{name}: {list(self._value(name).shape)}" for name in self.roles)
        return f"{type(self.spec).__name__}, {shapes}"


# Note [Another shape for the same parameter]
# An optimiser may hold a parameter, so it stays the same object. But autograd remembers its shape for as long as any
# earlier loss is alive, and would hand the next gradient over in that shape, summed or refused. Data of another dtype
# makes it forget (torch/csrc/autograd/variable.cpp, set_data).
def reshape(value: Tensor, data: Tensor, grad: Tensor | None) -> None:
    """Give a parameter or buffer data of another shape, and a gradient that fits it."""
    value.grad = None
    value.data = value.data.to(torch.float64 if value.dtype != torch.float64 else torch.float32)
    value.data = data
    value.grad = grad


def _size(value: Any, axis: int) -> int | None:
    return value.shape[axis] if isinstance(value, Tensor) and value.dim() > axis else None
