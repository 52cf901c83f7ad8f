"""The meta device, and a GPU where there is one."""

import torch
from torch import nn

from adapterzoo.layer import AdaptedLinear
from adapterzoo.testing.case import NAME, Case
from adapterzoo.testing.check import by_itself, check
from adapterzoo.testing.comparing import TOLERANCES, differs, same_bits, size
from adapterzoo.testing.failure import require


@check(by_itself)
def check_devices(case: Case) -> None:
    """On the meta device nothing is made; then to_empty and reset give the same start, and a GPU the same values."""
    base = case.base()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    layer = AdaptedLinear(base.to("meta"), case.piece, seed=case.seed, name=NAME)
    for name, value in layer.adapter.state_dict().items():
        require(value.is_meta, f"{name} of {case.piece} is made on {value.device} for a weight on the meta device")
    holder = nn.Sequential(layer).to_empty(device="cpu")
    holder.load_state_dict({f"0.{name}": value for name, value in state.items()}, strict=False)
    layer.reset()
    for name, value in case.start().adapter.state_dict().items():
        found = layer.adapter.state_dict()[name]
        same_bits(found, value, f"{name} of {case.piece} starts at other values when it comes from the meta device")
    if torch.cuda.is_available():
        _check_cuda(case)


def _check_cuda(case: Case) -> None:
    layer, x = case.perturbed().eval(), case.inputs()
    with torch.no_grad():
        y = layer(x)
        moved = layer.to("cuda")(x.to("cuda")).cpu()
    differs(moved, y, f"the forward of {case.piece} on a GPU", TOLERANCES[y.dtype].value * (size(y) + size(x.double())))
