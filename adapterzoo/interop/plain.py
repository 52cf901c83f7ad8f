"""A model as it was before it was adapted, with other weights: a stand-in that only writes files."""

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from adapterzoo.forms import form_of
from adapterzoo.kept import NormCache
from adapterzoo.layer import AdaptedLinear
from adapterzoo.quantised import find, refusal

_QUANTISED = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
_QUANTISED_CONFIG = ("quantization_config", "_pre_quantization_dtype")


def stand_in(model: nn.Module, plain: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """The model with some modules replaced, as another object; parameters, buffers and all else are shared with it.

    Args:
        model: it is left as it is.
        plain: what stands in the place of each of these modules.

    Returns:
        A model of the same class, with a config of its own. It serves to write files: what a module keeps outside of
        its submodules, such as hooks bound to it, is still the model's.
    """
    twin = _twin(model, dict(plain))
    if "config" in vars(twin):
        vars(twin)["config"] = copy.deepcopy(vars(twin)["config"])  # save_pretrained writes to it
    return twin


def plain_layer(layer: AdaptedLinear, weight: Tensor) -> nn.Module:
    """The layer's base with another weight, in the layout that `weight` of the layer has when it is merged."""
    if not layer.form.is_dense:
        return linear(weight, layer._parameters.get("bias"))
    twin = _copy(layer.base)
    twin.__dict__["_parameters"] = {**layer._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return twin


def quantised_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The quantised layers of a model that no adapter stands on."""
    return {
        name: module for name, module in model.named_modules()
        if not isinstance(module, AdaptedLinear) and (form := form_of(module)) is not None and not form.is_dense
    }  # fmt: skip


def unreadable(layer: nn.Module) -> str | None:
    """Say why a quantised layer can't be dequantised; None if it can."""
    return refusal(layer) if find(layer) is None else None


def dequantised(layer: nn.Module) -> Tensor:
    """The weight of a quantised layer as an ordinary matrix: [out, in]."""
    form, weight = form_of(layer), layer._parameters["weight"]
    assert form is not None
    assert weight is not None
    return form(layer).base(weight, NormCache()).dense().detach()


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An nn.Linear with these values: [out, in] and [out]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def forget_quantisation(model: nn.Module) -> None:
    """Take from a stand-in what says that its weights are quantised, as Transformers' own `dequantize` does."""
    config = vars(model).get("config")
    for holder, names in ((model, _QUANTISED), (config, _QUANTISED_CONFIG)):
        for name in names if holder is not None else ():
            vars(holder).pop(name, None)
    if hasattr(model, "is_quantized"):
        vars(model)["is_quantized"] = False


def _twin(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in done:
        twin = done[module] = _copy(module)
        twin.__dict__["_modules"] = {
            name: None if child is None else _twin(child, done) for name, child in module._modules.items()
        }
    return done[module]


def _copy(module: nn.Module) -> nn.Module:
    """Another object with the same attributes; copy.copy would run what a class does when it is unpickled."""
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    return twin
