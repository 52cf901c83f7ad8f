"""Round-off, 16-bit weights, cancellation, and MAP's start."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adapterzoo import MAP, SORA, AdaLoRA, AdaptedLinear, DoRA, FLoRA, LoRA, PreDiag, factored, wide
from adapterzoo.base import DenseBase
from adapterzoo.errors import UnfrozenBaseWarning
from adapterzoo.kept import NormCache

FACTORED = [LoRA(r=4, alpha=6), AdaLoRA(r=4), FLoRA(r=(4, 3))]


def perturbed(spec, out, cols, dtype=torch.float32, strength=0.05, bias=False):
    torch.manual_seed(0)
    layer = AdaptedLinear(nn.Linear(cols, out, bias=bias, dtype=dtype), spec)
    with torch.no_grad():
        for parameter in layer.adapter.parameters():
            parameter.add_(strength * torch.randn_like(parameter))
    return layer


WRAPS = {
    "DoRA": DoRA,
    "MAP": MAP,
    "DoRA(SORA(PreDiag))": lambda g: DoRA(SORA(PreDiag(g))),
    "SORA(MAP(DoRA))": lambda g: SORA(MAP(DoRA(g))),
}


@pytest.mark.parametrize("generator", FACTORED, ids=repr)
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("bias", [False, True])
def test_bf16_resolves_a_magnitude_change_of_a_thousandth(generator, wrap, bias):
    """With a perturbed update, +0.1 % on every outer magnitude moves ≥ 10 % of the outputs, by 1.001 on the whole."""
    layer = perturbed(WRAPS[wrap](generator), 256, 256, torch.bfloat16, strength=0.3, bias=bias)
    x = torch.randn(512, 256).to(torch.bfloat16)
    offset = 0 if layer.bias is None else layer.bias.detach().double()
    with torch.no_grad():
        old = layer(x)
        outer = layer.adapter.inner if isinstance(layer.spec, SORA) else layer.adapter
        for parameter in outer.parameters(recurse=False):
            parameter.mul_(1.001)
        new = layer(x)
    assert float((new != old).float().mean()) >= 0.10
    before, after = old.double() - offset, new.double() - offset
    assert float((before * after).sum() / before.square().sum()) == pytest.approx(1.001, abs=2e-4)


def test_bf16_rounds_its_output_once():
    """y = round(z + δ∘z + h Uᵀ) from the bf16 products z and h, summed in float32."""
    layer = perturbed(DoRA(LoRA(r=4)), 64, 48, torch.bfloat16, strength=0.3, bias=True)
    x = torch.randn(32, 48).to(torch.bfloat16)
    weight = layer.factored_weight()
    z = (x @ layer.weight.T).float()
    h = (x @ weight.V.value.to(torch.bfloat16).T).float()
    once = (z + weight.delta * z + h @ weight.U.T + layer.bias.float()).to(torch.bfloat16)
    agree = float((layer(x) == once).float().mean())
    twice = ((z + weight.delta * z).to(torch.bfloat16) + (h @ weight.U.T).to(torch.bfloat16)) + layer.bias
    assert agree > 0.999
    assert float((layer(x) == twice).float().mean()) < 0.9  # so the line above can fail


@pytest.mark.parametrize("spec", [DoRA(LoRA(r=4)), DoRA(SORA(MAP(LoRA(r=4))))], ids=repr)
def test_row_norms_over_a_bf16_weight_are_good_to_1e_5(spec, monkeypatch):
    monkeypatch.setattr(wide, "_BLOCK", 96 * 7)  # several row blocks, the last one shorter
    layer = perturbed(spec, 64, 96, torch.bfloat16, strength=0.3)
    inside = layer.adapter.inner.weight(layer.site())
    exact = (layer.weight.double() + (inside.dense() - layer.weight.float()).double()).norm(dim=1)
    torch.testing.assert_close(inside.row_norms().double(), exact, rtol=1e-5, atol=0)


def test_no_gradient_is_lost_over_a_bf16_weight():
    """Wide products over a 16-bit weight have a backward of their own: compared with a float64 layer."""
    spec = MAP(SORA(DoRA(LoRA(r=4), detach_norm=False)))
    layer = perturbed(spec, 24, 40, torch.bfloat16, strength=0.3)
    wide = AdaptedLinear(nn.Linear(40, 24, bias=False, dtype=torch.float64), spec)
    wide.load_state_dict(layer.state_dict())
    pull = torch.randn(24, 40, dtype=torch.float64)
    (layer.factored_weight().dense().double() * pull).sum().backward()
    (wide.factored_weight().dense() * pull).sum().backward()
    for (name, parameter), other in zip(layer.adapter.named_parameters(), wide.adapter.parameters(), strict=True):
        error = float((parameter.grad.double() - other.grad).norm() / other.grad.norm())
        assert error < 1e-4, (name, error)


@given(st.integers(1, 8), st.integers(2, 40), st.integers(0, 10**6), st.sampled_from([1e-1, 1e-3, 1e-6, 0.0]))
def test_norms_of_cancelling_sums_lose_no_more_than_they_must(rank, cols, seed, left):
    """Rows W + U V that nearly cancel: |n² − true n²| within float32 round-off of the terms' squares, never NaN."""
    draw = torch.Generator().manual_seed(seed)
    rank, out = min(rank, cols), 6
    U = torch.randn(out, rank, generator=draw)
    V = torch.randn(rank, cols, generator=draw)
    W = -U @ V * (1 - left)
    layer = AdaptedLinear(nn.Linear(cols, out, bias=False), DoRA(LoRA(r=min(rank, out))))
    site = layer.site()
    layer.weight.data.copy_(W)
    layer.refresh()
    inside = site.low_rank(U, V)
    true = (W.double() + U.double() @ V.double()).square().sum(dim=1)
    terms = (W.double().norm(dim=1) + (U.double().abs() @ V.double().abs()).norm(dim=1)).square()
    norms = inside.row_norms().double()
    assert torch.isfinite(norms).all()
    assert ((norms.square() - true).abs() <= 1e-6 * terms).all()
    update = site.low_rank(U, V).calibrate_base(torch.ones(out)).update_norm().double()
    assert abs(float(update.detach()) ** 2 - float(true.sum())) <= 1e-6 * float(terms.sum())


# Squares of 1e±25 leave float32, so norms have to be summed in float64. Under a rotation V is a product with W, and
# W Vᵀ, a float32 product, leaves float32 at 1e±19.
FAR = [
    (spec, scale)
    for spec in (MAP(LoRA(r=2)), DoRA(LoRA(r=2)), MAP(DoRA(LoRA(r=2))))
    for scale in (1e-25, 1e-9, 1e9, 1e25)
]
FAR += [(DoRA(SORA(PreDiag(FLoRA(r=2)))), scale) for scale in (1e-15, 1e-9, 1e9, 1e15)]


@pytest.mark.parametrize(("spec", "scale"), FAR, ids=str)
def test_far_scales_stay_finite_in_float32(spec, scale):
    torch.manual_seed(0)
    linear = nn.Linear(7, 5)
    with torch.no_grad():
        linear.weight.mul_(scale)
    layer = AdaptedLinear(linear, spec)
    for _ in range(2):
        layer(torch.randn(3, 7)).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.adapter.parameters())
        with torch.no_grad():
            for parameter in layer.adapter.parameters():
                parameter.add_(
                    0.3 * torch.randn_like(parameter) * (parameter.abs().mean() if parameter.any() else scale)
                )
    assert torch.isfinite(layer.effective_weight()).all()
    if isinstance(spec, DoRA):
        torch.testing.assert_close(
            layer.effective_weight().double().norm(dim=1), layer.adapter.magnitude.abs().double(), rtol=1e-5, atol=0
        )


def test_the_far_scales_would_notice_float32_sums(monkeypatch):
    for module in (wide, factored):
        monkeypatch.setattr(module, "wide", lambda x: x.float())
    with pytest.raises(AssertionError):
        test_far_scales_stay_finite_in_float32(DoRA(LoRA(r=2)), 1e-25)


def test_a_trainable_16_bit_weight_gets_its_gradient_through_norms():
    layer = perturbed(DoRA(SORA(LoRA(r=4)), detach_norm=False), 12, 20, torch.bfloat16, strength=0.3)
    layer.weight.requires_grad_()
    pull = torch.randn(12, generator=torch.Generator().manual_seed(3))
    with pytest.warns(UnfrozenBaseWarning):
        norms = layer.adapter.inner.weight(layer.site()).row_norms()
    (norms * pull).sum().backward()
    W = layer.weight.detach().double().requires_grad_()
    C, D = layer.adapter.inner.C.detach().double(), layer.adapter.inner.D.detach().double()
    lora, identity = layer.adapter.generator, torch.eye(12, dtype=torch.float64)
    P = D @ C.T - C @ D.T
    R = torch.linalg.solve(identity - P / 2, identity + P / 2)
    ((R @ (W + (lora.B @ lora.A).detach().double())).norm(dim=1) * pull).sum().backward()
    assert float((layer.weight.grad.double() - W.grad).norm() / W.grad.norm()) < 1e-2


def regression(spec, steps=600, lr=1e-2):
    """Final loss of plain AdamW, without clipping, on a rank-4 change of a 64 x 64 layer."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 64, bias=False)
    target = linear.weight.detach() + 0.05 * torch.randn(64, 4) @ torch.randn(4, 64)
    layer = AdaptedLinear(linear, spec)
    optimiser = torch.optim.AdamW(layer.adapter.parameters(), lr=lr)
    for _ in range(steps):
        x = torch.randn(64, 64)
        loss = (layer(x) - x @ target.T).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return float(loss.detach())


def test_map_trains_from_its_default_start_where_the_literal_one_sticks():
    default, literal = regression(MAP(LoRA(r=4))), regression(MAP(LoRA(r=4), floor="literal"))
    assert default < literal / 3, (default, literal)


def test_the_first_gradient_of_map_is_of_loras_size():
    """β/(ε‖W‖_F) = 100/‖W‖_F times LoRA's; the literal start has 1e6 times LoRA's."""

    def first(spec):
        torch.manual_seed(0)
        layer = AdaptedLinear(nn.Linear(64, 64), spec)
        layer(torch.randn(8, 64)).square().sum().backward()
        return layer, dict(layer.adapter.named_parameters())

    _, plain = first(LoRA(r=4))
    layer, mapped = first(MAP(LoRA(r=4)))
    _, literal = first(MAP(LoRA(r=4), floor="literal"))
    size = float(layer.weight.detach().norm())
    assert float(mapped["inner.B"].grad.norm() / plain["B"].grad.norm()) == pytest.approx(100 / size, rel=1e-4)
    assert float(literal["inner.B"].grad.norm() / plain["B"].grad.norm()) == pytest.approx(1e6, rel=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 24])
def test_wide_products_go_by_row_blocks(rows, monkeypatch):
    monkeypatch.setattr(wide, "_BLOCK", 32 * rows)
    draw = torch.Generator().manual_seed(0)
    W, x, y = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((24, 32), (2, 5, 32), (2, 5, 24)))
    base = DenseBase(W.bfloat16(), NormCache())
    torch.testing.assert_close(base.apply(x), x @ base.weight.double().mT)
    torch.testing.assert_close(base.apply_t(y), y @ base.weight.double())
