"""States and files."""

import tempfile

import torch
from torch import Tensor, nn

from adapterzoo.checkpoint.loading import load
from adapterzoo.checkpoint.saving import save
from adapterzoo.layer import AdaptedLinear
from adapterzoo.testing.case import Case
from adapterzoo.testing.check import by_itself, check
from adapterzoo.testing.comparing import same_bits


@check(by_itself)
def check_files(case: Case) -> None:
    """A state, and a saved directory, put into a layer of another seed give the same bits."""
    layer, x = case.perturbed().eval(), case.inputs()
    with torch.no_grad():
        y = layer(x)
        other = case.start(case.seed + 1).eval()
        other.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()})
        _check_same(case, "load_state_dict", other, layer, y, x)
        with tempfile.TemporaryDirectory() as directory:
            save(nn.Sequential(layer), directory)
            third = case.start(case.seed + 2).eval()
            load(nn.Sequential(third), directory)
        _check_same(case, "adapterzoo.load", third, layer, y, x)


def _check_same(case: Case, how: str, other: AdaptedLinear, layer: AdaptedLinear, y: Tensor, x: Tensor) -> None:
    found = other.adapter.state_dict()
    for name, value in layer.adapter.state_dict().items():
        same_bits(found[name], value, f"{name} of {case.piece} is another one after {how}")
    same_bits(
        other(x), y,
        f"{case.piece} computes something else after {how}: it depends on values that its parameters and buffers "
        "do not hold",
    )  # fmt: skip
