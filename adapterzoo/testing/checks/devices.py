"""The meta device, and a GPU where there is one."""

import torch
from torch import nn

from adapterzoo.layer import AdaptedLinear
from adapterzoo.testing.case import NAME, Case
from adapterzoo.testing.check import by_itself, check
from adapterzoo.testing.comparing import TOLERANCES, differs, same_bits, size
from adapterzoo.testing.failure import CheckFailedError, require


@check(by_itself)
def check_devices(case: Case) -> None:
    """On the meta device nothing is made; then to_empty and reset give the same start, and a GPU the same values."""
    base = case.base()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    layer = AdaptedLinear(base.to("meta"), case.piece, seed=case.seed, name=NAME)
    for name, value in layer.adapter.state_dict().items():
        where = f"{name} of {case.piece} is made on {value.device} for a weight on the meta device"
        require(value.is_meta, f"{where}: make it by site.zeros or a draw, or on site.device")
    _check_weight_on_meta(case, layer)
    holder = nn.Sequential(layer).to_empty(device="cpu")
    holder.load_state_dict({f"0.{name}": value for name, value in state.items()}, strict=False)
    layer.reset()
    for name, value in case.start().adapter.state_dict().items():
        found = layer.adapter.state_dict()[name]
        same_bits(found, value, f"{name} of {case.piece} starts at other values when it comes from the meta device")
    if torch.cuda.is_available():
        _check_cuda(case)


def _check_weight_on_meta(case: Case, layer: AdaptedLinear) -> None:
    """What `update` makes itself has to lie where the layer does. (Products with W don't run on the meta device.)"""
    try:
        weight = layer.adapter.generator.weight(layer.site())
    except RuntimeError as error:
        raise CheckFailedError(
            f"{case.piece} mixes devices for a weight on the meta device: make tensors on site.device ({error})"
        ) from error
    for what, value in (("δ", weight.delta), ("U", weight.U), ("D", weight.remainder)):
        require(value is None or value.is_meta, f"{case.piece} makes {what} elsewhere than on site.device")


def _check_cuda(case: Case) -> None:
    layer, x = case.perturbed().eval(), case.inputs()
    with torch.no_grad():
        y = layer(x)
        moved = layer.to("cuda")(x.to("cuda")).cpu()
    differs(moved, y, f"the forward of {case.piece} on a GPU", TOLERANCES[y.dtype].value * (size(y) + size(x.double())))
