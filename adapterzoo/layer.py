"""AdaptedLinear: a base layer, a spec and parameters. It knows no piece by name."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from adapterzoo.adapter import Adapter
from adapterzoo.base import WeightShape
from adapterzoo.errors import (
    InputError,
    MergedError,
    UnfrozenBaseWarning,
    UninitialisedError,
    UnsupportedLayerError,
    where,
)
from adapterzoo.factored import FactoredWeight
from adapterzoo.forms import Form, form_of
from adapterzoo.forms.nested import by_token
from adapterzoo.kept import KeptFactors, NormCache
from adapterzoo.pieces import Piece
from adapterzoo.precision import full_precision
from adapterzoo.sharded import gathered, is_sharded, local, sharded_like, write
from adapterzoo.site import Site
from adapterzoo.support import (
    FILE_HOOK_TABLES,
    HOOK_TABLES,
    BaseOption,
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
    """What a merge will store: W', the base weight to keep (None: it is dropped), and where it was asked to be.

    `lost` is ‖round(W') − W'‖_F / ‖W' − W‖_F, the share of the update that rounding to the weight's dtype takes.
    """

    weight: Tensor
    kept: Tensor | None
    base_device: torch.device | str | None
    lost: float


class AdaptedLinear(nn.Module):
    """A linear layer, convolution or embedding whose weight is conditioned by any composition of pieces.

        y = x W'ᵀ + bias,  W' = W + diag(δ) W + U V + D  (docs/algebra.md)

    It stands in for its base: it holds the base's own parameters under the base's own names (`weight`, `bias`, beside
    `adapter.…`), so a checkpoint of the base loads into it, and the base's attributes and hooks are its own. It
    freezes the base. W' is never formed in forward, except for pieces without structure.

    Everything acts on W: [out, in], a matrix: the weight of an nn.Linear, that of Transformers' Conv1D transposed, the
    kernel of a convolution with a row for every filter, [out, in/groups · kernel], or the weight of an embedding
    transposed, [embedding_dim, num_embeddings] (docs/layers.md).

    Shapes:
        input and output are the base's: [..., in_features] and [..., out_features] of an nn.Linear.

    Args:
        base: an nn.Linear, nn.Conv1d, Conv2d, Conv3d, nn.Embedding, Transformers' Conv1D, or a quantised linear layer;
            it is frozen, and its parameters become this layer's.
        spec: what adapts it, such as MAP(AdaLoRA(r=16)).
        seed: seed of the initial values, together with `name`; the global random state is neither read nor changed.
        name: the layer's name in its model, for streams of random numbers and for messages.
        adapter_dtype: torch.bfloat16 or torch.float32 for the adapter's factors; by default they have the weight's
            dtype, but at least float32. Magnitudes and rotations are float32 or wider in any case.
        lean: where a gain for each row trains, keep y for the backward, which the next operation often keeps anyway,
            instead of x Wᵀ. An operation that changes y in place is then torch's error in the backward.

    Raises:
        UnsupportedLayerError: base is of another kind, or has something that an adapter would bypass or lose.
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
    base: nn.Module
    form: Form
    weight: nn.Parameter
    unmerged_weight: Tensor | None

    # (Not by a __setattr__ of its own: FSDP2 writes what it gathers past that of nn.Module, and by any other not.)
    stride, padding, dilation, groups, padding_mode, padding_idx = (BaseOption() for _ in range(6))

    def __init__(
        self,
        base: nn.Module,
        spec: Piece,
        *,
        seed: int = 0,
        name: str = "",
        adapter_dtype: torch.dtype | None = None,
        lean: bool = False,
    ) -> None:
        super().__init__()
        problem, kind = unsupported(base), form_of(base)
        if problem is not None or kind is None:
            raise UnsupportedLayerError(name, type(base).__name__, str(problem))
        self.form = kind(base)
        check_adapter_dtype(adapter_dtype)
        spec = check_fits(spec, self.form.shape, name, self.form.layer_type)
        self.name, self.seed, self.lean = name, check_seed(seed), lean
        self.merged, self.disabled, self._warned = False, False, False
        self._base_device: torch.device | str | None = None
        self._norms = NormCache()
        self._norms.bind(cast(Tensor, base.weight))
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
        self._initialised = not self.weight.is_meta
        self.file_had_adapter: bool | None = None  # whether the last file that was loaded held all of it
        self._factors.bind([(self._parameters, "weight"), *adapter.places()])
        self.train(base.training)
        WATCH.see(self)

    @property
    def spec(self) -> Piece:
        """The composition."""
        return self.adapter.spec

    @property
    def kind(self) -> str:
        """What kind of layer it is: "linear", "transposed", "convolution", "embedding", or that of a quantised one."""
        return self.form.kind

    @property
    def shape(self) -> WeightShape:
        """(out, in) of W as a matrix, and the kernel of a convolution."""
        return self.form.shape

    @property
    def in_features(self) -> int:
        """Columns of W as a matrix."""
        return self.form.shape.in_features

    @property
    def out_features(self) -> int:
        """Rows of W as a matrix."""
        return self.form.shape.out_features

    def __getattr__(self, name: str) -> Any:
        """As every module; and what models read of their layers, such as a convolution's stride, is the base's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("base")
            if base is None or name.startswith("_") or not hasattr(base, name):
                raise
            value = getattr(base, name)
            if callable(value) and name not in vars(base):  # a method, such as reset_parameters, is none of ours
                raise
            return value

    def forward(self, x: Tensor) -> Tensor:
        """Apply W' and the bias, as the base applies W and the bias.

        Raises:
            InputError: the input has a shape or, outside autocast, a dtype that the layer can't take.
            MergedError: the layer is merged and a gradient of the adapter is asked for.
            UninitialisedError: the adapter was allocated on the meta device and has no values yet.
        """
        if x.is_nested and self.form.token_wise:
            return by_token(self.forward, x, self.name)
        self._norms.see(self.weight)
        self._check_input(x)
        if self.disabled:
            return self.form.plain(x, gathered(self._base_weight()), self._bias)
        if self.merged:
            self._check_no_gradient_is_lost()
            return self.form.plain(x, self.weight, self._bias)
        weight = self._factors.get(self.factored_weight)
        dropout = weight.dropout if self.training else 0.0
        return self.form.adapted(x, self.weight, weight, self._bias, dropout, self.lean)

    @property
    def _bias(self) -> Tensor | None:
        return getattr(self, "bias", None)  # no parameter where it was pruned or parametrised

    def factored_weight(self) -> FactoredWeight:
        """W' in normal form, from the parameters as they are now; differentiable."""
        if not (self._initialised or self._factors.are_given()):
            raise UninitialisedError(self.name)
        with full_precision(self.weight.device.type):
            return self.adapter.weight(self.site())

    def effective_weight(self) -> Tensor:
        """W', in the weight's layout and dtype, rounded once; differentiable. Dropout is no part of it."""
        with full_precision(self.weight.device.type):
            weight = self.factored_weight()
            return self.form.stored(weight.dense()).to(weight.base.dtype)

    def delta_weight(self) -> Tensor:
        """W' − W, in the weight's layout and dtype, computed without the subtraction; differentiable."""
        with full_precision(self.weight.device.type):
            weight = self.factored_weight()
            return self.form.stored(weight.dense_update()).to(weight.base.dtype)

    def merge(
        self, keep_base: bool = True, base_device: torch.device | str | None = None, dequantize: bool = False
    ) -> None:
        """Put W' in the place of the weight. The base weight is kept, so `unmerge` gives it back bit for bit.

        While merged, `state_dict()` still holds the base weight; loading, merging again and a forward that wants a
        gradient of the adapter are errors. W' is formed in at least float32 and rounded once, to the weight's dtype.

        Args:
            keep_base: False drops the base weight, to save memory; then there is no way back.
            base_device: where to keep it; where it is by default.
            dequantize: put an ordinary weight in the place of a quantised one, which can't hold W'.

        Raises:
            MergedError: merged already, W' is not finite, base_device can't keep anything, or the weight is quantised
                and `dequantize` is not given. Nothing was changed.
        """
        self.commit_merge(self.prepare_merge(keep_base, base_device, dequantize))

    def prepare_merge(
        self, keep_base: bool = True, base_device: torch.device | str | None = None, dequantize: bool = False
    ) -> Merge:
        """Everything that `merge` computes and that can fail; the layer is left as it is.

        Raises:
            MergedError: as `merge`.
        """
        if self.merged:
            raise MergedError(f"{where(self.name)} is already merged; there is nothing to do")
        self.check_own_weight()
        if not (self.form.is_dense or dequantize):
            raise MergedError(
                f"{where(self.name)} has a quantised weight ({self.kind}), which can't hold the merged one: "
                "dequantize=True puts an ordinary weight in its place, which takes the memory of one"
            )
        if base_device is not None and torch.device(base_device).type == "meta":
            raise MergedError(f"{where(self.name)}: the meta device can't keep a base weight; keep_base=False drops it")
        with torch.inference_mode(False), torch.no_grad():
            weight, lost = self._merged_weight()
            kept = self._to_keep(base_device) if keep_base else None
        if not bool(torch.isfinite(weight).all()):
            raise MergedError(f"{where(self.name)} has an effective weight that is not finite; nothing was merged")
        return Merge(sharded_like(weight, self.weight), kept, base_device, lost)

    def _merged_weight(self) -> tuple[Tensor, float]:
        """W' in the weight's layout and dtype, and the share of W' − W that rounding to that dtype takes."""
        with full_precision(self.weight.device.type):
            weight = self.factored_weight()
            exact = self.form.stored(weight.dense())
            rounded = exact.to(weight.base.dtype).contiguous()
            lost = 0.0
            if rounded.dtype != exact.dtype:
                size = float(weight.update_norm())
                lost = float(torch.linalg.vector_norm(rounded - exact)) / size if size else 0.0
        if self.form.is_dense and not is_sharded(self.weight):  # in the base's own strides, such as channels_last
            rounded = torch.empty_like(self.weight, requires_grad=False).copy_(rounded)
        return rounded, lost

    def commit_merge(self, merge: Merge) -> None:
        """Take what `prepare_merge` gave: assignments only, nothing that can fail."""
        self._buffers["unmerged_weight"], self._base_device = merge.kept, merge.base_device
        self._swap(merge.weight, merged=True)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit.

        Raises:
            MergedError: not merged, or merged with keep_base=False. Nothing was changed.
        """
        self.check_unmergeable()
        base_weight = self._base_weight()
        self._buffers["unmerged_weight"] = None
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
        return self.form.released().train(self.training)

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
        self.base.train(mode)  # kernels of quantised layers go by it
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
        base = self.form.base(weight, self._norms)
        dtype = torch.promote_types(base.dtype, torch.float32)
        return Site(base, dtype, self.name, self.seed, one_hot=self.form.one_hot)

    def _base_weight(self) -> Tensor:
        if not self.merged:
            return self.weight
        if self.unmerged_weight is None:
            raise MergedError(f"{where(self.name)} {_GONE}")
        kept = self.unmerged_weight
        return kept if kept.device == self.weight.device else kept.to(self.weight.device)

    def _to_keep(self, base_device: torch.device | str | None) -> Tensor:
        if not self.form.is_dense:  # the parameter itself: its class knows how its values are read
            return self.weight if base_device is None else self.weight.to(base_device)
        base_weight = self.weight.detach()
        base_weight = base_weight.clone() if is_sharded(base_weight) else base_weight  # shards are overwritten in place
        return base_weight.to(base_device or base_weight.device)

    def _swap(self, weight: Tensor, merged: bool) -> None:
        if not self.form.is_dense:
            self._parameters["weight"] = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, False)
        elif is_sharded(self.weight):
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
        problem = self.form.bad_input(x, self.weight)
        if problem is not None:
            raise InputError(self.name, problem)

    def _check_no_gradient_is_lost(self) -> None:
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.adapter.parameters()):
            raise MergedError(
                f"{where(self.name)} is merged, so its adapter gets no gradient: "
                "run the forward under torch.no_grad(), or unmerge first"
            )

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
        if self.merged and not self.form.is_dense:
            with self._base_weight_in_place():
                self.base._save_to_state_dict(destination, prefix, keep_vars)
            return
        self.base._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = self._base_weight()

    @contextmanager
    def _base_weight_in_place(self) -> Iterator[None]:
        merged = self._parameters["weight"]
        self._parameters["weight"] = cast(nn.Parameter, self._base_weight())
        try:
            yield
        finally:
            self._parameters["weight"] = merged

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
        if self.form.keeps_state:
            rest = {key: value for key, value in state_dict.items() if not key.startswith(f"{prefix}adapter.")}
            self.base._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        else:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self.file_had_adapter = all(f"{prefix}adapter.{name}" in state_dict for name in self.adapter.state_dict())

    def after_load(self) -> None:
        """Take note of loaded values: a file with the whole adapter initialises it, if it is not on the meta device."""
        whole = self._initialised or (bool(self.file_had_adapter) and not self._is_blank())
        self._initialised = whole and not self._on_meta()
        self.refresh()

    def extra_repr(self) -> str:
        """What the base says of itself, and the spec."""
        own = self.base.extra_repr() or f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{own}, spec={self.spec!r}{', merged' if self.merged else ''}"


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers of a model by name, each once; none is fine."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def _after_load(layer: nn.Module, keys: Any) -> None:
    assert isinstance(layer, AdaptedLinear)
    layer.after_load()
