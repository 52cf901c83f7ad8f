"""Pieces against the numbers of PEFT and LyCORIS, every trained parameter perturbed; and where theirs are at fault."""

import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from torch import nn

from adapterzoo import OFT, AdaptedLinear, ColumnDoRA, Frozen, LoHa, LoKr, LoRA, PiSSA, VeRA


def plain(bias=True):
    torch.manual_seed(1)
    return nn.Linear(12, 10, bias=bias).double()


def theirs(config, bias=True):
    """PEFT's model over the same layer, its adapter parameters perturbed, and these by their short names."""
    model = get_peft_model(nn.Sequential(plain(bias)), config)
    values = {name.split(".")[-2]: p for name, p in model.named_parameters() if p.requires_grad}
    values = values or {name: p for name, p in model.named_parameters() if "oft_R" in name}
    with torch.no_grad():
        for value in values.values():
            value.copy_(0.2 * torch.randn_like(value))
    return model, values


def agree(layer, model, x=None):
    x = torch.randn(5, 12, dtype=torch.float64) if x is None else x
    torch.testing.assert_close(layer(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("series", [True, False])
def test_oft_is_pefts_and_its_exact_form_turns_the_other_way(series, bias):
    config = OFTConfig(
        r=0, oft_block_size=4, target_modules=["0"], use_cayley_neumann=series, num_cayley_neumann_terms=200
    )
    model, values = theirs(config, bias)
    (skew,) = values.values()
    layer = AdaptedLinear(plain(bias), OFT(Frozen(), block_size=4))
    with torch.no_grad():
        skew.mul_(0.5)  # so that the series converges
        layer.adapter.skew.copy_(skew if series else -skew)
    agree(layer, model)


def test_pefts_five_terms_are_no_rotation():
    model, values = theirs(OFTConfig(r=0, oft_block_size=4, target_modules=["0"]), bias=False)
    (skew,) = values.values()
    layer = AdaptedLinear(plain(bias=False), OFT(Frozen(), block_size=4))
    with torch.no_grad():
        skew.mul_(3)
        layer.adapter.skew.copy_(skew)
        identity = torch.eye(12, dtype=torch.float64)
        base, their, own = layer.weight @ layer.weight.T, model(identity), layer(identity)
        torch.testing.assert_close(own.T @ own, base)
        assert (their.T @ their - base).norm() > 0.1 * base.norm()


LOKR = [
    ({"r": 1, "alpha": 3}, ("lokr_w1", "lokr_w2_a", "lokr_w2_b")),
    ({"r": 8, "alpha": 3}, ("lokr_w1", "lokr_w2")),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("options", "names"), LOKR, ids=str)
def test_lokr_is_pefts(options, names, bias):
    model, values = theirs(LoKrConfig(target_modules=["0"], **options), bias)
    assert sorted(name.split(".")[0] for name in values) == sorted(names)
    layer = AdaptedLinear(plain(bias), LoKr(**options))
    with torch.no_grad():
        for name, value in values.items():
            getattr(layer.adapter, name.replace("lokr_w", "W")).copy_(value)
    agree(layer, model)


def test_columndora_is_lycoris_over_the_inputs():
    base = plain()
    module = LoConModule("one", base, lora_dim=3, alpha=6, weight_decompose=True, wd_on_out=False).double()
    layer = AdaptedLinear(plain(), ColumnDoRA(LoRA(r=3, alpha=6)))
    assert list(module.dora_scale.shape) == [1, 12]
    torch.testing.assert_close(module.dora_scale[0], layer.adapter.magnitude)
    with torch.no_grad():
        for value in (module.lora_down.weight, module.lora_up.weight, module.dora_scale):
            value.add_(0.2 * torch.randn_like(value))
        layer.adapter.magnitude.copy_(module.dora_scale[0])
        layer.adapter.inner.A.copy_(module.lora_down.weight)
        layer.adapter.inner.B.copy_(module.lora_up.weight)
    torch.testing.assert_close(layer.effective_weight(), module.get_merged_weight()[0], rtol=1e-7, atol=1e-7)


def test_pissa_is_pefts():
    config = LoraConfig(r=3, lora_alpha=6, init_lora_weights="pissa", target_modules=["0"])
    model = get_peft_model(nn.Sequential(plain().float()), config).double()  # PEFT decomposes in float32
    layer = AdaptedLinear(plain(), PiSSA(r=3, alpha=6))
    peer = model.base_model.model[0]
    A, B, own = peer.lora_A.default.weight, peer.lora_B.default.weight, layer.adapter
    torch.testing.assert_close(B @ A, own.B @ own.A, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        x = torch.randn(5, 12, dtype=torch.float64)
        torch.testing.assert_close(model(x), plain()(x), rtol=1e-5, atol=1e-6)
        signs = (A * own.A).sum(dim=1).sign()  # a singular vector's sign is nobody's
        for theirs_, ours in ((A, own.A), (B.T, own.B.T)):
            change = 0.2 * torch.randn_like(ours)
            ours.add_(change)
            theirs_.add_(signs[:, None] * change)
    torch.testing.assert_close(layer(x), model(x), rtol=1e-5, atol=1e-5)


def copy_loha(layer, values):
    with torch.no_grad():
        for name, value in values.items():
            getattr(layer.adapter, name.replace("hada_w", "W")).copy_(value)


@pytest.mark.parametrize("bias", [True, False])
def test_loha_is_pefts(bias):
    model, values = theirs(LoHaConfig(r=3, alpha=6, target_modules=["0"]), bias)
    layer = AdaptedLinear(plain(bias), LoHa(r=3, alpha=6))
    copy_loha(layer, {name.split(".")[0]: value for name, value in values.items()})
    agree(layer, model)


def test_loha_is_lycoris_forward_and_its_merge_scales_twice():
    base = plain()
    module = LohaModule("one", base, lora_dim=3, alpha=6).double()
    values = dict(module.named_parameters())
    with torch.no_grad():
        for value in values.values():
            value.copy_(0.5 * torch.randn_like(value))
    layer = AdaptedLinear(plain(), LoHa(r=3, alpha=6))
    copy_loha(layer, {name: value for name, value in values.items() if name.startswith("hada")})
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), module(x))
    wrong = module.get_merged_weight()[0] - base.weight
    torch.testing.assert_close(wrong, 2 * layer.delta_weight())


def test_vera_is_pefts_on_the_widest_layer():
    """PEFT's A has the scale of the widest layer; on that layer both are the same function of the same matrices."""
    model, values = theirs(VeraConfig(r=7, target_modules=["0"]))
    layer, peer = AdaptedLinear(plain(), VeRA(r=7)), model.base_model.model[0]
    bounds = {"A": (6 / 12) ** 0.5, "B": (6 / 7) ** 0.5}
    frozen = {name: getattr(peer, f"vera_{name}")["default"].double() for name in bounds}
    for name, bound in bounds.items():
        for matrix in (frozen[name], getattr(layer.adapter, name)):
            assert 0.8 * bound <= matrix.abs().max() <= bound
    with torch.no_grad():
        for name, value in values.items():
            layer.adapter.get_parameter(name.removeprefix("vera_lambda_").split(".")[0]).copy_(value)
    layer.load_state_dict({f"adapter.{name}": value for name, value in frozen.items()}, strict=False)
    agree(layer, model)
