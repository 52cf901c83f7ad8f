"""AdaptedLinear: a base layer, a spec and parameters. It knows no piece by name."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterzoo.adapter import Adapter
from adapterzoo.base import DenseBase
from adapterzoo.errors import (
    InputError,
    MergedError,
    UnfrozenBaseWarning,
    UninitialisedError,
    UnsupportedLayerError,
    where,
)
from adapterzoo.factored import FactoredWeight
from adapterzoo.functional import factored_linear
from adapterzoo.kept import KeptFactors, NormCache
from adapterzoo.pieces import Piece, Site
from adapterzoo.precision import full_precision
from adapterzoo.sharded import gathered, is_sharded, local, sharded_like, write
from adapterzoo.support import (
    FILE_HOOK_TABLES,
    HOOK_TABLES,
    check_adapter_dtype,
    check_fits,
    check_seed,
    frozen,
    guards_fused_paths,
    unsupported,
)
from adapterzoo.watch import WATCH

_GONE = "was merged with keep_base=False: its base weight is gone; unload(model, merge=True) makes it a plain layer"


class Merge(NamedTuple):
    """What a merge will store: W', the base weight to keep (None: it is dropped), and where it was asked to be."""

    weight: Tensor
    kept: Tensor | None
    base_device: torch.device | str | None


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
        adapter_dtype: torch.bfloat16 or torch.float32 for the adapter's factors; by default they have the weight's
            dtype, but at least float32. Magnitudes and rotations are float32 or wider in any case.
        lean: where a gain for each row trains, keep y for the backward, which the next operation often keeps anyway,
            instead of x Wᵀ. An operation that changes y in place is then torch's error in the backward.

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
        lean: bool = False,
    ) -> None:
        super().__init__()
        problem = unsupported(base)
        if problem is not None:
            raise UnsupportedLayerError(name, type(base).__name__, problem)
        check_adapter_dtype(adapter_dtype)
        spec = check_fits(spec, base, name)
        self.name, self.seed, self.lean = name, check_seed(seed), lean
        self.merged, self.disabled, self._warned = False, False, False
        self._base_device: torch.device | str | None = None
        self._norms = NormCache()
        self._norms.bind(base.weight)
        self._factors: KeptFactors[FactoredWeight] = KeptFactors()
        self.__dict__["base"] = base  # kept, but no submodule: its parameters are this layer's own
        self._parameters = base._parameters
        with frozen(base):  # so that the norms that initial values need are kept
            adapter = Adapter(spec, self.site(), adapter_dtype)
        for table in HOOK_TABLES + FILE_HOOK_TABLES:
            self.__dict__[table] = base.__dict__[table]
        self._is_full_backward_hook = base._is_full_backward_hook
        self._guard = self.register_forward_pre_hook(guards_fused_paths)
        self._file_guard = self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.adapter = adapter
        self._initialised = not base.weight.is_meta
        self._file_had_whole_adapter = False
        self._factors.bind([(self._parameters, "weight"), *adapter.places()])
        self.train(base.training)
        WATCH.see(self)

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
            InputError: the input's width is not in_features, or its dtype not the weight's, outside autocast.
            MergedError: the layer is merged and a gradient of the adapter is asked for.
            UninitialisedError: the adapter was allocated on the meta device and has no values yet.
        """
        if x.is_nested:
            return self._forward_nested(x)
        self._norms.see(self.weight)
        self._check_input(x)
        if self.disabled:
            return F.linear(x, gathered(self._base_weight()), self.bias)
        if self.merged:
            self._check_no_gradient_is_lost()
            return F.linear(x, self.weight, self.bias)
        weight = self._factors.get(self.factored_weight)
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
            lean=self.lean,
        )

    def factored_weight(self) -> FactoredWeight:
        """W' in normal form, from the parameters as they are now; differentiable."""
        if not self._initialised:
            raise UninitialisedError(self.name)
        with full_precision(self.weight.device.type):
            return self.adapter.weight(self.site())

    def effective_weight(self) -> Tensor:
        """W': [out, in], in the weight's dtype, rounded once; differentiable. Dropout is no part of it."""
        with full_precision(self.weight.device.type):
            return self.factored_weight().dense().to(self.weight.dtype)

    def delta_weight(self) -> Tensor:
        """W' − W: [out, in], in the weight's dtype, computed without the subtraction; differentiable."""
        with full_precision(self.weight.device.type):
            return self.factored_weight().dense_update().to(self.weight.dtype)

    def merge(self, keep_base: bool = True, base_device: torch.device | str | None = None) -> None:
        """Put W' in the place of the weight. The base weight is kept, so `unmerge` gives it back bit for bit.

        While merged, `state_dict()` still holds the base weight; loading, merging again and a forward that wants a
        gradient of the adapter are errors.

        Args:
            keep_base: False drops the base weight, to save memory; then there is no way back.
            base_device: where to keep it; where it is by default.

        Raises:
            MergedError: merged already, W' is not finite, or base_device can't keep anything. Nothing was changed.
        """
        self.commit_merge(self.prepare_merge(keep_base, base_device))

    def prepare_merge(self, keep_base: bool = True, base_device: torch.device | str | None = None) -> Merge:
        """Everything that `merge` computes and that can fail; the layer is left as it is.

        Raises:
            MergedError: as `merge`.
        """
        if self.merged:
            raise MergedError(f"{where(self.name)} is already merged; there is nothing to do")
        self.check_own_weight()
        if base_device is not None and torch.device(base_device).type == "meta":
            raise MergedError(f"{where(self.name)}: the meta device can't keep a base weight; keep_base=False drops it")
        with torch.inference_mode(False), torch.no_grad():
            weight = self.effective_weight()
            kept = self._to_keep(base_device) if keep_base else None
        if not bool(torch.isfinite(weight).all()):
            raise MergedError(f"{where(self.name)} has an effective weight that is not finite; nothing was merged")
        return Merge(sharded_like(weight, self.weight), kept, base_device)

    def commit_merge(self, merge: Merge) -> None:
        """Take what `prepare_merge` gave: assignments only, nothing that can fail."""
        self.unmerged_weight, self._base_device = merge.kept, merge.base_device
        self._swap(merge.weight, merged=True)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit.

        Raises:
            MergedError: not merged, or merged with keep_base=False. Nothing was changed.
        """
        self.check_unmergeable()
        base_weight = self._base_weight()
        self.unmerged_weight = None
        self._swap(base_weight, merged=False)

    def check_unmergeable(self) -> None:
        """Raise a MergedError unless `unmerge` can do its work."""
        if not self.merged:
            raise MergedError(f"{where(self.name)} is not merged")
        if self.unmerged_weight is None:
            raise MergedError(f"{where(self.name)} {_GONE}")

    def check_own_weight(self) -> None:
        """Raise a MergedError unless the weight is a parameter of its own, which can be replaced."""
        if not isinstance(self._parameters.get("weight"), nn.Parameter):
            raise MergedError(
                f"{where(self.name)} was pruned or parametrised after it was adapted, so its weight can't be replaced; "
                "undo that first (prune.remove, parametrize.remove_parametrizations)"
            )

    def release(self) -> nn.Module:
        """The base layer, with the parameters as they are now; this layer is of no use afterwards."""
        self._guard.remove()
        self._file_guard.remove()
        self.base._is_full_backward_hook = self._is_full_backward_hook
        self.base.train(self.training)
        return self.base

    def reset(self, seed: int | None = None) -> None:
        """Set the adapter to its initial values, from the base weight as it is now.

        Args:
            seed: another seed than before.

        Raises:
            MergedError: the layer is merged.
            UninitialisedError: the layer is still on the meta device.
            SpecError: the seed is no whole number.
        """
        self.check_resettable()
        self.seed = self.seed if seed is None else check_seed(seed)
        if self._on_meta():
            self.adapter.to_empty(device=self.weight.device)
        self.refresh()
        self.adapter.reset(self.site())
        self._initialised = True

    def check_resettable(self) -> None:
        """Raise a MergedError or UninitialisedError unless `reset` can do its work."""
        if self.merged:
            raise MergedError(f"{where(self.name)} is merged; unmerge it before resetting its adapter")
        if self.weight.is_meta:
            raise UninitialisedError(self.name)

    def refresh(self) -> None:
        """Forget what is kept between calls: call it after writing to a weight or a parameter through `.data`."""
        self._norms.bind(self.weight)
        self._factors.bind([(self._parameters, "weight"), *self.adapter.places()])

    def train(self, mode: bool = True) -> Self:
        """As every module does; what is kept between calls is forgotten."""
        self._factors.clear()
        return super().train(mode)

    def site(self) -> Site:
        """What the pieces may know of this layer, as it is now: what initial values and norms are made of."""
        weight = gathered(self._base_weight())
        if weight.requires_grad and not self._warned:
            self._warned = True
            warnings.warn(
                f"the base weight of {where(self.name)} trains: its norms are computed anew, "
                "with gradient, at every call; layer.weight.requires_grad_(False) freezes it",
                UnfrozenBaseWarning,
                stacklevel=2,
            )
        return Site(DenseBase(weight, self._norms), _factor_dtype(weight), self.name, self.seed)

    def _base_weight(self) -> Tensor:
        if not self.merged:
            return self.weight
        if self.unmerged_weight is None:
            raise MergedError(f"{where(self.name)} {_GONE}")
        return self.unmerged_weight.to(self.weight.device)

    def _to_keep(self, base_device: torch.device | str | None) -> Tensor:
        base_weight = self.weight.detach()
        base_weight = base_weight.clone() if is_sharded(base_weight) else base_weight  # shards are overwritten in place
        return base_weight.to(base_device or base_weight.device)

    def _swap(self, weight: Tensor, merged: bool) -> None:
        if is_sharded(self.weight):
            write(self.weight, weight)
        else:
            self.weight.data = weight
        self.merged = merged
        self.adapter.lock(merged)
        self.refresh()

    def _check_input(self, x: Tensor) -> None:
        if is_sharded(self.weight):
            raise InputError(
                self.name,
                "holds shards of its weights (DTensors), and a forward needs them whole: call the module that "
                "fully_shard was applied to, which gathers them; tensor parallelism is not supported",
            )
        if x.dim() == 0 or x.shape[-1] != self.weight.shape[1]:
            raise InputError(self.name, f"takes inputs [..., {self.weight.shape[1]}]; got {list(x.shape)}")
        if x.dtype != self.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise InputError(
                self.name,
                f"has a weight of {self.weight.dtype} and got an input of {x.dtype}: cast one, or use autocast",
            )

    def _check_no_gradient_is_lost(self) -> None:
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.adapter.parameters()):
            raise MergedError(
                f"{where(self.name)} is merged, so its adapter gets no gradient: "
                "run the forward under torch.no_grad(), or unmerge first"
            )

    def _forward_nested(self, x: Tensor) -> Tensor:
        """Token by token, as every linear layer; nn.TransformerEncoder nests padded batches in evaluation."""
        if x.layout == torch.jagged:
            if x.lengths() is not None or x._ragged_idx != 1:  # type: ignore[attr-defined]
                raise InputError(
                    self.name, "takes contiguous jagged inputs [batch, ragged, in]; call .contiguous() first"
                )
            offsets = x.offsets()  # type: ignore[attr-defined]
            return torch.nested.nested_tensor_from_jagged(self.forward(x.values()), offsets)
        return torch.nested.as_nested_tensor([self.forward(part) for part in x.unbind()])

    def _on_meta(self) -> bool:
        return any(value.is_meta for value in self.adapter.state_dict().values())

    # Note [Blank adapters]
    # torch's distributed checkpoints fill what a file lacks with the model's own tensors, so the names in a file don't
    # tell whether it brought anything. What has left the meta device is NaN until something is written to it.
    def _make_blank(self) -> None:
        with torch.no_grad():
            for value in self.adapter.state_dict().values():
                local(value).fill_(torch.nan)

    def _is_blank(self) -> bool:
        own = [local(value) for value in self.adapter.state_dict().values()]
        return any(bool(value.isnan().all()) for value in own if value.numel() and not value.is_meta)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        was_meta = self._on_meta()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.unmerged_weight is not None and self._base_device is not None:
            self.unmerged_weight = self.unmerged_weight.to(self._base_device)
        if was_meta or self._on_meta():
            self._initialised = False
            self._make_blank()
        self.refresh()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.disabled = False  # a copy that is made inside `disabled(model)` is made to last
        self.refresh()
        WATCH.see(self)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As every module does; a new weight has new norms."""
        super().register_parameter(name, param)
        if name == "weight" and param is not None and "_norms" in self.__dict__:
            self._norms.bind(param)

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
        # Trainers load with strict=False, and drop what is unexpected without a word.
        found = {key.removeprefix(f"{prefix}adapter.") for key in state_dict if key.startswith(f"{prefix}adapter.")}
        own = self.adapter.state_dict().keys()
        if not found <= own:
            errors.append(
                f"{where(self.name)} has an adapter with {', '.join(sorted(own))}, and the file one with "
                f"{', '.join(sorted(found))}: that is another composition than {self.spec!r}"
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self._file_had_whole_adapter = all(
            f"{prefix}adapter.{name}" in state_dict for name in self.adapter.state_dict()
        )

    def after_load(self) -> None:
        """Take note of loaded values: a file with the whole adapter initialises it, if it is not on the meta device."""
        whole = self._initialised or (self._file_had_whole_adapter and not self._is_blank())
        self._initialised = whole and not self._on_meta()
        self.refresh()

    def extra_repr(self) -> str:
        """Shape, bias and spec."""
        state = ", merged" if self.merged else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"spec={self.spec!r}{state}"
        )


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers of a model by name, each once; none is fine."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def _factor_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _after_load(layer: nn.Module, keys: Any) -> None:
    assert isinstance(layer, AdaptedLinear)
    layer.after_load()
