"""AdaptedLinear: a base layer, a spec and parameters. It knows no piece by name."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from adapterzoo.adapter import Adapter
from adapterzoo.base import DenseBase, NormCache
from adapterzoo.errors import (
    MergedError,
    MisfitError,
    SpecError,
    UnfrozenBaseWarning,
    UninitialisedError,
    UnsupportedLayerError,
    where,
)
from adapterzoo.factored import FactoredWeight
from adapterzoo.functional import factored_linear
from adapterzoo.pieces import Piece, Site, misfit

# What user code may hang on a module. A layer and its base share these tables, so hooks keep firing, handles keep
# removing them, and nothing is lost on the way back.
_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class AdaptedLinear(nn.Module):
    """A linear layer whose weight is conditioned by any composition of pieces.

        y = x W'ᵀ + bias,  W' = W + diag(δ) W + U V + D  (docs/algebra.md)

    It stands in for its base: it holds the base's own parameters under the base's own names (`weight`, `bias`, beside
    `adapter.…`), so a checkpoint of the base loads into it, and `in_features`, `out_features` and hooks are the base's.
    It freezes the base. W' is never formed in forward, except for pieces without structure.

    Shapes:
        input [..., in_features], output [..., out_features].

    Args:
        base: an nn.Linear; it is frozen, and its parameters become this layer's.
        spec: what adapts it, such as MAP(AdaLoRA(r=16)).
        seed: seed of the initial values, together with `name`; the global random state is neither read nor changed.
        name: the layer's name in its model, for streams of random numbers and for messages.
        adapter_dtype: dtype of the adapter's factors; by default that of the weight, but at least float32. Magnitudes
            and rotations are float32 or wider in any case.

    Raises:
        UnsupportedLayerError: base is not an nn.Linear with an ordinary floating-point weight.
        SpecError: spec is no spec.
        MisfitError: the spec does not fit the shape of the layer.

    Example:
        >>> import torch
        >>> from adapterzoo import AdaptedLinear, DoRA, LoRA
        >>> layer = AdaptedLinear(torch.nn.Linear(64, 32), DoRA(LoRA(r=4)))
        >>> layer.effective_weight().equal(layer.weight)
        True
    """

    adapter: Adapter
    base: nn.Linear
    weight: nn.Parameter
    bias: nn.Parameter | None
    unmerged_weight: Tensor | None

    def __init__(
        self,
        base: nn.Linear,
        spec: Piece,
        *,
        seed: int = 0,
        name: str = "",
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        problem = unsupported(base)
        if problem is not None:
            raise UnsupportedLayerError(name, type(base).__name__, problem)
        check_fits(spec, base, name)
        self.name, self.seed = name, seed
        self.merged, self.disabled, self._warned = False, False, False
        self._base_device: torch.device | str | None = None
        self._norms = NormCache()
        self._norms.bind(base.weight)
        site = Site(DenseBase(base.weight, self._norms), _factor_dtype(base.weight), name, seed)
        with _frozen(base):  # so that the norms that initial values need are kept
            adapter = Adapter(spec, site, adapter_dtype)
        self.__dict__["base"] = base  # kept, but no submodule: its parameters are this layer's own
        self._parameters = base._parameters
        for table in _HOOK_TABLES:
            self.__dict__[table] = base.__dict__[table]
        self._is_full_backward_hook = base._is_full_backward_hook
        self._guard = self.register_forward_pre_hook(_keeps_fused_paths_away)
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.adapter = adapter
        self._initialised = not base.weight.is_meta
        self.train(base.training)

    @property
    def spec(self) -> Piece:
        """The composition."""
        return self.adapter.spec

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return int(self.weight.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """Apply W' and the bias: [..., in] -> [..., out].

        Raises:
            MergedError: the layer is merged and a gradient of the adapter is asked for.
            UninitialisedError: the adapter was allocated on the meta device and has no values yet.
        """
        if x.is_nested:  # nn.TransformerEncoder makes one of padded batches in evaluation
            return torch.nested.as_nested_tensor([self.forward(part) for part in x.unbind()])
        if self.disabled:
            return F.linear(x, self._base_weight(), self.bias)
        if self.merged:
            self._check_no_gradient_is_lost()
            return F.linear(x, self.weight, self.bias)
        weight = self.factored_weight()
        return factored_linear(
            x,
            weight.base,
            weight.delta,
            weight.U,
            None if weight.V is None else weight.V.value,
            self.bias,
            remainder=weight.remainder,
            dropout=weight.dropout if self.training else 0.0,
            drop_rows=weight.drop_rows,
        )

    def factored_weight(self) -> FactoredWeight:
        """W' in normal form, from the parameters as they are now; differentiable."""
        if not self._initialised:
            raise UninitialisedError(self.name)
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.adapter.weight(self._site())

    def effective_weight(self) -> Tensor:
        """W': [out, in], in the weight's dtype, rounded once; differentiable. Dropout is no part of it."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.factored_weight().dense().to(self.weight.dtype)

    def delta_weight(self) -> Tensor:
        """W' − W: [out, in], in the weight's dtype, computed without the subtraction; differentiable."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.factored_weight().dense_update().to(self.weight.dtype)

    def merge(self, keep_base: bool = True, base_device: torch.device | str | None = None) -> None:
        """Put W' in the place of the weight. The base weight is kept, so `unmerge` gives it back bit for bit.

        While merged, `state_dict()` still holds the base weight; loading, merging again and a forward that wants a
        gradient of the adapter are errors.

        Args:
            keep_base: False drops the base weight, to save memory; then there is no way back.
            base_device: where to keep it; where it is by default.

        Raises:
            MergedError: merged already, or W' is not finite. Nothing was changed.
        """
        self.commit_merge(self.merged_weight(), keep_base, base_device)

    def merged_weight(self) -> Tensor:
        """W' as `merge` would store it, checked; the layer is left as it is.

        Raises:
            MergedError: merged already, or W' is not finite.
        """
        if self.merged:
            raise MergedError(f"{where(self.name)} is already merged; unmerge it first")
        with torch.inference_mode(False), torch.no_grad():
            weight = self.effective_weight()
        if not bool(torch.isfinite(weight).all()):
            raise MergedError(f"{where(self.name)} has an effective weight that is not finite; nothing was merged")
        return weight

    def commit_merge(self, weight: Tensor, keep_base: bool, base_device: torch.device | str | None) -> None:
        """Store what `merged_weight` gave; can't fail half-way."""
        self.unmerged_weight = self.weight.detach().to(base_device or self.weight.device) if keep_base else None
        self._base_device = base_device
        self._swap(weight, merged=True)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit.

        Raises:
            MergedError: not merged, or merged with keep_base=False. Nothing was changed.
        """
        self.check_unmergeable()
        self._swap(self._base_weight().to(self.weight.device), merged=False)
        self.unmerged_weight = None

    def check_unmergeable(self) -> None:
        """Raise a MergedError unless `unmerge` can do its work."""
        if not self.merged:
            raise MergedError(f"{where(self.name)} is not merged")
        if self.unmerged_weight is None:
            raise MergedError(f"{where(self.name)} was merged with keep_base=False: its base weight is gone")

    def release(self) -> nn.Module:
        """The base layer, with the parameters as they are now; this layer is of no use afterwards."""
        self._guard.remove()
        self.base.train(self.training)
        return self.base

    def reset(self, seed: int | None = None) -> None:
        """Set the adapter to its initial values, from the base weight as it is now.

        Args:
            seed: another seed than before.

        Raises:
            MergedError: the layer is merged.
            UninitialisedError: the layer is still on the meta device.
        """
        if self.merged:
            raise MergedError(f"{where(self.name)} is merged; unmerge it before resetting its adapter")
        if self.weight.is_meta:
            raise UninitialisedError(self.name)
        self.seed = self.seed if seed is None else seed
        self.refresh()
        self.adapter.reset(self._site())
        self._initialised = True

    def refresh(self) -> None:
        """Forget what is kept of the base weight: call it after writing to the weight through `.data`."""
        self._norms.bind(self.weight)

    def _site(self) -> Site:
        weight = self._base_weight()
        if weight.requires_grad and not self._warned:
            self._warned = True
            warnings.warn(
                f"the base weight of {where(self.name)} trains: its norms are computed anew, "
                "with gradient, at every call",
                UnfrozenBaseWarning,
                stacklevel=2,
            )
        return Site(DenseBase(weight, self._norms), _factor_dtype(weight), self.name, self.seed)

    def _base_weight(self) -> Tensor:
        if not self.merged:
            return self.weight
        if self.unmerged_weight is None:
            raise MergedError(f"{where(self.name)} was merged with keep_base=False: its base weight is gone")
        return self.unmerged_weight.to(self.weight.device)

    def _swap(self, weight: Tensor, merged: bool) -> None:
        self.weight.data = weight
        self.merged = merged
        self.adapter.lock(merged)
        self.refresh()

    def _check_no_gradient_is_lost(self) -> None:
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.adapter.parameters()):
            raise MergedError(
                f"{where(self.name)} is merged, so its adapter gets no gradient: "
                "run the forward under torch.no_grad(), or unmerge first"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.unmerged_weight is not None and self._base_device is not None:
            self.unmerged_weight = self.unmerged_weight.to(self._base_device)
        if any(value.is_meta for value in self.adapter.state_dict().values()):
            self._initialised = False
        self.refresh()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = self._base_weight()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        if self.merged:
            errors.append(f"{where(self.name)} is merged and takes no values; unmerge it before loading")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        own = [f"{prefix}adapter.{name}" for name in self.adapter.state_dict()]
        self._initialised = self._initialised or all(name in state_dict for name in own)
        self.refresh()

    def extra_repr(self) -> str:
        """Shape, bias and spec."""
        state = ", merged" if self.merged else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"spec={self.spec!r}{state}"
        )


def unsupported(module: nn.Module) -> str | None:
    """Say why AdaptedLinear can't stand in for a module; None if it can."""
    if isinstance(module, AdaptedLinear):
        return "it is adapted already, and a layer takes one adapter; unload it first, or compose the specs"
    if not isinstance(module, nn.Linear):
        return "only nn.Linear layers can be adapted so far"
    if parametrize.is_parametrized(module):
        return "it is parametrised; remove the parametrisation first (torch.nn.utils.parametrize)"
    if type(module).forward is not nn.Linear.forward:
        return "its class has a forward of its own, which an adapter would bypass"
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return "its shape is not known yet; run the model once first"
    if type(module.weight) is not nn.Parameter or not module.weight.is_floating_point():
        return f"its weight is a {type(module.weight).__name__} of {module.weight.dtype}, not an ordinary matrix"
    return None


def check_fits(spec: object, base: nn.Linear, name: str) -> None:
    """Raise a SpecError or MisfitError unless spec is a spec that fits the layer."""
    if isinstance(spec, type) and issubclass(spec, Piece):
        raise SpecError(f"{where(name)} was given the class {spec.__name__}; build it: {spec.__name__}(...)")
    if not isinstance(spec, Piece):
        raise SpecError(f"{where(name)} needs a spec such as MAP(LoRA(r=8)), not {spec!r}")
    problem = misfit(spec, base.out_features, base.in_features)
    if problem is not None:
        raise MisfitError(name, (base.out_features, base.in_features), repr(spec), problem)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Freeze a module's own parameters, for good unless the body fails."""
    flags = {parameter: parameter.requires_grad for parameter in module.parameters(recurse=False)}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        yield
    except BaseException:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        raise


def _factor_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _keeps_fused_paths_away(module: nn.Module, args: Any) -> None:
    """Do nothing: torch's fused encoder layer reads `linear1.weight` itself, unless a module in it has a hook."""
