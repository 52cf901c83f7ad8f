"""Maps of inputs and Kronecker products, deeper than the kit draws: maps over maps with other gains, rotations."""

import pytest
import torch

from adapterzoo import AdaptedLinear
from adapterzoo.testing import Case, check_gradients, check_merge, check_norms, check_start, check_values

DEEP = [
    "ColumnDoRA(MAP(OFT(LoRA(r=2, alpha=3), block_size=2)))",
    "OFT(PreDiag(BoRA(LoKr(r=1))), block_size=2)",
    "OFT(MAP(ColumnDoRA(PreDiag(BoRA(LoRA(r=1))))), block_size=2)",
    "SORA(MAP(ColumnDoRA(LoKr(r=1))), rank=1)",
    "SORA(DoRA(LoKr(r=1)), rank=1)",
    "BoRA(LoRA(r=1, alpha=3), detach_norm=False)",
    "BoRA(MAP(ColumnDoRA(PiSSA(r=1))), detach_norm=False)",
    "MAP(ColumnDoRA(PreDiag(OFT(Full(), block_size=2))))",
    "DoRA(OFT(OFT(LoRA(r=2), block_size=1), block_size=2))",
    "MAP(SORA(LoKr(r=1), rank=1))",
    "OFT(MAP(LoRA(r=2, alpha=3)), block_size=2)",
    "ColumnDoRA(DoRA(SORA(LoRA(r=1, alpha=3), rank=1)), detach_norm=False)",
]


@pytest.mark.parametrize("check", [check_values, check_gradients, check_norms, check_start, check_merge], ids=repr)
@pytest.mark.parametrize("spec", DEEP)
def test_deep_compositions(spec, check):
    check(spec)


@pytest.mark.parametrize("spec", DEEP)
def test_gradients_do_not_depend_on_whether_the_input_needs_one(spec):
    case = Case(spec, shape=(6, 4), seed=3)
    found = []
    for needed in (True, False):
        layer, x = case.perturbed(), case.inputs().requires_grad_(needed)
        y = layer(x)
        (y * case.functional(y)).sum().backward()
        found.append([value.grad for value in layer.adapter.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gain", [1.0, 1e-12])
@pytest.mark.parametrize("spec", ["OFT(DoRA(LoRA(r=2, alpha=3)), block_size=2)", "BoRA(LoRA(r=2, alpha=3))"])
def test_lean_layers_have_the_same_gradients(spec, gain):
    """Also where the product with W has to be formed anew: it is that of the mapped input."""
    case = Case(spec, shape=(6, 4), seed=3)
    layer, x = case.perturbed(), case.inputs()
    lean = AdaptedLinear(case.base(), case.piece, lean=True)
    lean.load_state_dict(layer.state_dict())
    found = []
    for each in (layer, lean):
        with torch.no_grad():
            part = next(part for part in each.adapter.parts() if {"magnitude", "rows"} & set(part.roles))
            part.values().get("magnitude", part.values().get("rows"))[0] *= gain
        each.refresh()
        (each(x) * case.functional(each(x))).sum().backward()
        found.append([value.grad for value in each.adapter.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
