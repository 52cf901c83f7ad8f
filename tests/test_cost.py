"""What a step costs, counted: operations of matrix products, and bytes that live on after the forward.

The shape and the limits are those of the claims in docs/speed.md, which `make bench` prints too; one layer 2048 x 2048,
1024 tokens, rank 16, every parameter away from its start. Counts are exact, so nothing here depends on the machine.
"""

from itertools import pairwise

import pytest
import torch
from torch import nn

from adapterzoo import MAP, SORA, AdaLoRA, AdaptedLinear, DoRA, FLoRA, LoRA, PreDiag
from adapterzoo.factored import FactoredWeight
from benchmarks.counted import alive_bytes, flops
from benchmarks.counted_check import check

TOKENS, WIDTH, RANK = 1024, 2048, 16
LORAS = 4 * TOKENS * WIDTH * WIDTH + 6 * TOKENS * RANK * (WIDTH + WIDTH)  # two base products, and six thin ones
OUTPUT = 4 * TOKENS * WIDTH  # bytes of one output-sized tensor

CHAIN = (MAP, DoRA, PreDiag, MAP, SORA, DoRA)


def deep(depth, **options):
    spec = LoRA(r=RANK, alpha=8, **options)
    for wrap in CHAIN[:depth]:
        spec = wrap(spec)
    return spec


LORA = deep(0)
SIX_DEEP = deep(6)


def layer_of(spec, tokens=TOKENS, width=WIDTH, **options):
    torch.manual_seed(0)
    layer = AdaptedLinear(nn.Linear(width, width), spec, **options)
    with torch.no_grad():
        for parameter in layer.adapter.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return layer, torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)


def operations(spec, **shape):
    """Of a whole step; the layer has not run before, so nothing of another step is used."""
    layer, x, dy = layer_of(spec, **shape)
    return flops(lambda: layer(x).backward(dy))


def left_behind(spec, **options):
    """Bytes beyond x, parameters and y that live on after a forward, in output-sized tensors; norms of W are kept."""
    layer, x, _ = layer_of(spec, **options)
    layer(x)
    return alive_bytes(lambda: layer(x), [x, *layer.parameters(), *layer.buffers()]) / OUTPUT


@pytest.mark.parametrize(
    ("spec", "limit"),
    [
        (LORA, 1.001),
        (AdaLoRA(r=RANK, alpha=8), 1.001),
        (FLoRA(r=RANK, scale=0.5), 1.001),
        (PreDiag(LORA), 1.001),
        (MAP(LORA), 1.002),
        (DoRA(LORA), 1.009),
        (SORA(PreDiag(LORA)), 1.021),
        (SIX_DEEP, 1.05),
    ],
    ids=repr,
)
def test_operations_are_loras(spec, limit):
    share = operations(spec) / LORAS
    assert 1 - 1e-9 <= share <= limit


@pytest.mark.parametrize(
    ("spec", "limit"),
    [
        (LORA, 0.05),
        (AdaLoRA(r=RANK, alpha=8), 0.05),
        (FLoRA(r=RANK, scale=0.5), 0.05),
        (MAP(LORA), 0.05),
        (MAP(AdaLoRA(r=RANK, alpha=8)), 0.05),
        (MAP(FLoRA(r=RANK, scale=0.5)), 0.05),
        (DoRA(LORA), 1.1),
        (PreDiag(LORA), 1.1),
        (SORA(LORA), 1.1),
        (SORA(PreDiag(LORA)), 1.1),
        (DoRA(MAP(FLoRA(r=RANK, scale=0.5))), 1.1),
        (SIX_DEEP, 1.2),
    ],
    ids=repr,
)
def test_bytes_are_loras(spec, limit):
    assert left_behind(spec) <= limit


@pytest.mark.parametrize("depth", [0, 1, 2, 6])
def test_dropout_adds_a_mask(depth):
    assert 0.25 <= left_behind(deep(depth, dropout=0.1)) - left_behind(deep(depth)) <= 0.3


@pytest.mark.parametrize("spec", [DoRA(LORA), PreDiag(LORA), SORA(PreDiag(LORA)), SIX_DEEP], ids=repr)
def test_lean_keeps_nothing_of_the_outputs_size_but_the_output(spec):
    assert left_behind(spec, lean=True) == pytest.approx(left_behind(spec) - 1, abs=0.01)


def test_what_no_one_trains_is_not_kept():
    """With the magnitudes frozen there is no gradient that wants x Wᵀ."""
    layer, x, _ = layer_of(DoRA(LORA))
    layer.adapter.magnitude.requires_grad_(False)
    layer(x)
    assert alive_bytes(lambda: layer(x), [x, *layer.parameters()]) / OUTPUT <= 0.05


def test_operations_do_not_grow_with_depth_by_more_than_the_wrappers_own():
    """A wrapper adds passes of W over at most R + 8 thin rows, whatever stands below it."""
    small = {"tokens": 64, "width": 256}
    costs = [operations(deep(depth), **small) for depth in range(len(CHAIN) + 1)]
    one_pass = 2 * 256 * 256 * (RANK + 8)
    for cheaper, dearer in pairwise(costs):
        assert dearer - cheaper <= 4 * one_pass + 6 * 64 * 8 * (256 + 256)


def test_the_counters_agree_with_cases_known_by_hand():
    check()


def test_the_counts_can_fail(monkeypatch):
    """A dense norm, a copy of the input and an output kept too many are seen."""
    with monkeypatch.context() as patch:
        patch.setattr(FactoredWeight, "row_norms", lambda self, constant=False: self.dense().norm(dim=1))
        assert operations(DoRA(LORA)) / LORAS > 1.009
    with monkeypatch.context() as patch:
        original = AdaptedLinear.forward
        patch.setattr(AdaptedLinear, "forward", lambda self, x: original(self, x * 1.0))
        assert left_behind(LORA) > 0.9


@pytest.mark.parametrize(("frozen", "thin"), [("A", 3), ("B", 4)])
def test_a_frozen_factor_costs_no_gradient(frozen, thin):
    """Without ∂x: x Vᵀ, h Uᵀ and ∂U, or x Vᵀ, h Uᵀ, ∂h and ∂V."""
    layer, x, dy = layer_of(LORA, tokens=64, width=256)
    getattr(layer.adapter, frozen).requires_grad_(False)
    done = flops(lambda: layer(x.detach()).backward(dy))
    assert done == 2 * 64 * 256 * 256 + thin * 2 * 64 * RANK * 256
