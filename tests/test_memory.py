"""What forward and backward form: no [out, in] and no [in, in] matrix for pieces with structure, whatever the depth."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adapterzoo import MAP, SORA, AdaLoRA, AdaptedLinear, DoRA, FLoRA, Full, LoRA, PreDiag, wide
from adapterzoo.factored import FactoredWeight

OUT, IN, TOKENS = 192, 160, 24
SIX_DEEP = DoRA(SORA(MAP(PreDiag(DoRA(MAP(LoRA(r=4)))))))
FACTORED = [
    wrap(generator)
    for generator in (LoRA(r=4), AdaLoRA(r=4), FLoRA(r=(4, 3)), LoRA(r=4, dropout=0.1))
    for wrap in (
        lambda g: g,
        MAP,
        DoRA,
        PreDiag,
        SORA,
        lambda g: SORA(PreDiag(g)),
        lambda g: DoRA(g, detach_norm=False),
    )
] + [SIX_DEEP, SORA(DoRA(LoRA(r=4)), map="exp"), SORA(LoRA(r=4), map="first_order", damping=1.0)]


class LargeResults(TorchDispatchMode):
    """Counts results as large as the weight that are no view of the weight itself."""

    def __init__(self, weight):
        super().__init__()
        self.own, self.found = weight.untyped_storage().data_ptr(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            large = isinstance(tensor, torch.Tensor) and tensor.numel() >= min(OUT, IN) ** 2
            if large and tensor.untyped_storage().data_ptr() != self.own:
                self.found.append((str(function), tuple(tensor.shape), tensor.dtype))
        return result


def large_results(spec, dtype=torch.float32):
    torch.manual_seed(0)
    layer = AdaptedLinear(nn.Linear(IN, OUT, dtype=dtype), spec)
    with torch.no_grad():
        for parameter in layer.adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(TOKENS, IN, dtype=dtype, requires_grad=True)
    with LargeResults(layer.weight) as counter:
        layer(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.adapter.parameters())
    return counter.found


@pytest.mark.parametrize("spec", FACTORED, ids=repr)
def test_nothing_as_large_as_the_weight_is_formed(spec):
    assert large_results(spec) == []


@pytest.mark.parametrize("spec", [DoRA(LoRA(r=4)), SIX_DEEP], ids=repr)
def test_a_16_bit_weight_is_widened_by_row_blocks_only(spec, monkeypatch):
    monkeypatch.setattr(wide, "_BLOCK", IN * 16)
    assert large_results(spec, torch.bfloat16) == []


def test_the_count_can_fail(monkeypatch):
    assert large_results(Full())
    monkeypatch.setattr(FactoredWeight, "row_norms", lambda self, constant: self.dense().norm(dim=1))
    assert large_results(DoRA(LoRA(r=4)))


def test_the_norms_of_a_frozen_weight_are_taken_once(monkeypatch):
    """The second forward widens nothing of W: its row norms are kept."""
    layer = AdaptedLinear(nn.Linear(IN, OUT), DoRA(LoRA(r=4)))
    calls = []
    original = wide.row_norms_sq

    def counted(matrix):
        calls.append(matrix.shape)
        return original(matrix)

    monkeypatch.setattr("adapterzoo.base.row_norms_sq", counted)
    for _ in range(3):
        layer(torch.randn(2, IN)).sum().backward()
    assert calls == []
    layer.refresh()
    layer(torch.randn(2, IN))
    layer(torch.randn(2, IN))
    assert calls == [(OUT, IN)]
