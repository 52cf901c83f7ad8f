"""What a layer must be, and what a user may ask of it, before an adapter stands in for it; what the two share."""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from adapterzoo.base import WeightShape
from adapterzoo.errors import MisfitError, SpecError, where
from adapterzoo.forms import form_of
from adapterzoo.pieces import Piece, check_is_spec, misfit
from adapterzoo.sharded import is_sharded

# Hooks that user code, or FSDP2, may hang on a module. A layer and its base share these tables, so hooks keep firing,
# handles keep removing them, and they are there on the way back.
HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
FILE_HOOK_TABLES = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class BaseOption:
    """An option of the base, such as a convolution's stride: set on the layer, it is set where it is read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: nn.Module, owner: type) -> Any:
        try:
            return vars(layer.__dict__["base"])[self.name]
        except KeyError:
            raise AttributeError(f"{owner.__name__!r} object has no attribute {self.name!r}") from None

    def __set__(self, layer: nn.Module, value: Any) -> None:
        setattr(layer.__dict__["base"], self.name, value)


def unsupported(module: nn.Module) -> str | None:
    """Say why AdaptedLinear can't stand in for a module; None if it can."""
    if guards_fused_paths in module._forward_pre_hooks.values():  # an adapted layer, or the base of one
        return "it is adapted already, and a layer takes one adapter; unload it first, or compose the specs"
    form = form_of(module)
    if form is None:
        return _no_form(module)
    if parametrize.is_parametrized(module):
        return "it is parametrised; remove the parametrisation first (torch.nn.utils.parametrize)"
    weight: Any = module._parameters.get("weight")
    if weight is None and form.is_dense:  # as under the older weight_norm
        own = ", ".join(name for name, value in module._parameters.items() if value is not None)
        return f"its weight is no parameter; if it is computed from others ({own or 'none'}), undo that first"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its shape is not known yet; run the model once first"
    if is_sharded(weight):
        return (
            "its weight is in shards over several processes: for FSDP2 adapt the model first, then fully_shard it; "
            "tensor parallel layers can't be adapted"
        )
    kept = [*module._buffers, *module._modules, *(table for table in FILE_HOOK_TABLES if vars(module)[table])]
    if kept and not form.keeps_state:
        return f"it holds what an adapted layer would lose: {', '.join(kept)}"
    return form.problem(module)


def _no_form(module: nn.Module) -> str:
    if isinstance(module, nn.MultiheadAttention):
        return (
            "it keeps q, k and v in one parameter and reads out_proj.weight itself, so an adapter would change "
            "nothing; put an attention in its place that calls nn.Linear layers for q, k, v and the output "
            "(F.scaled_dot_product_attention between them), and adapt those"
        )
    return (
        "layers of its class can't be; nn.Linear, nn.Conv1d, Conv2d and Conv3d, nn.Embedding, Transformers' Conv1D and "
        "quantised linear layers can"
    )


def check_fits(spec: object, shape: WeightShape, name: str, layer_type: str | None = None) -> Piece:
    """The spec; raise a SpecError or MisfitError unless it is one and fits the layer."""
    spec = check_is_spec(spec, f"{where(name)} needs a spec")
    problem = misfit(spec, shape, layer_type)
    if problem is not None:
        raise MisfitError(name, shape[:2], repr(spec), problem)
    return spec


def check_seed(seed: object) -> int:
    """The seed as an int; raise a SpecError unless it is a whole number (1.0 would draw other values than 1)."""
    try:
        if not isinstance(seed, bool):
            return operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise SpecError(f"seed={seed!r} is not valid: it should be a whole number")


def check_adapter_dtype(dtype: torch.dtype | None) -> None:
    """Raise a SpecError unless an adapter's factors may have this dtype."""
    if dtype not in (None, torch.bfloat16, torch.float32):
        raise SpecError(f"adapter_dtype={dtype!r} is not valid: it should be torch.bfloat16, torch.float32 or None")


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
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


def guards_fused_paths(module: nn.Module, args: Any) -> None:
    """Do nothing, as a hook: torch's fused encoder layer reads `linear1.weight` itself unless a module in it has one.

    It is also the mark by which an adapted layer, and the base of one, are known.
    """
