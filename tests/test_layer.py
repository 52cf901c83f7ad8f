"""AdaptedLinear among PyTorch's own machinery: files, copies, dtypes, devices, torch.func, hooks, merged states."""

import copy
import io
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import adapterzoo as az
from adapterzoo import MAP, SORA, AdaLoRA, AdaptedLinear, DoRA, FLoRA, Full, LoRA, PreDiag, wide
from adapterzoo.errors import (
    MergedError,
    MisfitError,
    SpecError,
    UnfrozenBaseWarning,
    UninitialisedError,
    UnsupportedLayerError,
)

DEEP = MAP(DoRA(SORA(PreDiag(LoRA(r=3, alpha=5)), rank=2)))


def with_buffer(linear):
    linear.register_buffer("scale", torch.ones(1))
    return linear


def with_forward(linear):
    linear.forward = lambda x: 100 * nn.Linear.forward(linear, x)
    return linear


def layer_of(spec=DEEP, dtype=torch.float32, seed=0, bias=True, **options):
    torch.manual_seed(seed)
    layer = AdaptedLinear(nn.Linear(7, 5, bias=bias, dtype=dtype), spec, seed=seed, **options)
    with torch.no_grad():
        for parameter in layer.adapter.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


@pytest.fixture
def x():
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(1))


def _AB(prefix):
    return {f"{prefix}A": (2, 7), f"{prefix}B": (5, 2)}


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        (LoRA(r=3), {"A": (3, 7), "B": (5, 3)}),
        (AdaLoRA(r=3), {"P": (5, 3), "lam": (3,), "Q": (3, 7), "mask": (3,)}),
        (FLoRA(r=(2, 3)), {"A": (5, 2), "core": (2, 3), "B": (3, 7)}),
        (Full(), {"delta": (5, 7)}),
        (DoRA(LoRA(r=2)), {"magnitude": (5,), "inner.A": (2, 7), "inner.B": (5, 2)}),
        (MAP(PreDiag(LoRA(r=2))), {"alpha": (1,), "beta": (1,), "inner.diag": (5,), **_AB("inner.inner.")}),
        (SORA(PreDiag(Full()), rank=2), {"C": (5, 2), "D": (5, 2), "inner.diag": (5,), "inner.inner.delta": (5, 7)}),
    ],
    ids=repr,
)  # fmt: skip
def test_parameter_names_and_shapes_are_public(spec, shapes):
    state = AdaptedLinear(nn.Linear(7, 5), spec).state_dict()
    expected = {"weight": (5, 7), "bias": (5,), **{f"adapter.{name}": shape for name, shape in shapes.items()}}
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


def test_initial_values_are_the_documented_ones():
    linear = nn.Linear(3000, 400)
    spec = MAP(DoRA(SORA(PreDiag(LoRA(r=50)), rank=40)))
    start = AdaptedLinear(linear, spec).adapter.state_dict()
    W = linear.weight.detach()
    assert float(start["inner.inner.inner.inner.A"].abs().max()) == pytest.approx(3000**-0.5, rel=1e-3)
    assert float(start["inner.inner.inner.inner.A"].std()) == pytest.approx((3 * 3000) ** -0.5, rel=0.02)
    assert not start["inner.inner.inner.inner.B"].any()
    assert (start["inner.inner.inner.diag"] == 1).all()
    C, D = start["inner.inner.C"], start["inner.inner.D"]
    assert torch.equal(C, D)
    assert float(C.std()) == pytest.approx((3 * 400) ** -0.5, rel=0.02)
    torch.testing.assert_close(start["inner.magnitude"], W.norm(dim=1))
    torch.testing.assert_close(start["alpha"], W.double().norm()[None].float())
    assert start["beta"].tolist() == [1.0]
    ada = AdaptedLinear(nn.Linear(3000, 400), AdaLoRA(r=50)).adapter.state_dict()
    assert float(ada["P"].std()) == pytest.approx(0.02, rel=0.02)
    assert float(ada["Q"].std()) == pytest.approx(0.02, rel=0.02)
    assert not ada["lam"].any()
    flora = AdaptedLinear(nn.Linear(3000, 400), FLoRA(r=(50, 20))).adapter.state_dict()
    assert float(flora["A"].std()) == pytest.approx((2 * 50) ** -0.5, rel=0.02)
    assert float(flora["B"].std()) == pytest.approx((2 * 20) ** -0.5, rel=0.02)
    assert not flora["core"].any()


def test_streams_differ_by_seed_layer_depth_and_parameter():
    def draw(spec=LoRA(r=5), seed=0, name="a"):
        return AdaptedLinear(nn.Linear(5, 5), spec, seed=seed, name=name).adapter

    A = draw().A
    assert torch.equal(A, draw().A)
    assert not torch.equal(A, draw(seed=1).A)
    assert not torch.equal(A, draw(name="b").A)
    twice = draw(SORA(SORA(LoRA(r=2), rank=2), rank=2))
    assert not torch.equal(twice.C, twice.inner.C)
    flora = draw(FLoRA(r=5))
    assert not torch.equal(flora.A, flora.B)


def test_it_stands_in_for_its_base(x):
    linear = nn.Linear(7, 5)
    weight, bias = linear.weight, linear.bias
    layer = AdaptedLinear(linear, DEEP)
    assert (layer.in_features, layer.out_features) == (7, 5)
    assert layer.weight is weight
    assert layer.bias is bias
    assert not weight.requires_grad
    assert not bias.requires_grad
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        f"adapter.{name}" for name, _ in layer.adapter.named_parameters()
    }
    other = nn.Linear(7, 5)
    layer.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(linear.weight, other.weight)
    assert "spec=MAP(DoRA(SORA(PreDiag(LoRA(r=3, alpha=5)), rank=2)))" in repr(layer)


def test_effective_and_delta_weight_are_differentiable_and_agree():
    layer = layer_of(dtype=torch.float64)
    torch.testing.assert_close(layer.effective_weight() - layer.weight, layer.delta_weight())
    layer.delta_weight().square().sum().backward()
    assert all(parameter.grad.any() for parameter in layer.adapter.parameters())


def test_hooks_of_the_base_keep_firing_and_survive_unload(x):
    linear, calls = nn.Linear(7, 5), []
    handle = linear.register_forward_hook(lambda *_: calls.append("old"))
    model = nn.Sequential(linear)
    az.adapt(model, LoRA(r=2))
    model[0].register_forward_hook(lambda *_: calls.append("new"))
    model(x)
    assert calls == ["old", "new"]
    handle.remove()
    az.unload(model, merge=True)(x)
    assert calls == ["old", "new", "new"]
    assert model[0] is linear
    assert not linear._forward_pre_hooks


def copies(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    yield copy.deepcopy(layer)
    yield pickle.loads(pickle.dumps(layer))
    yield torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_equal_and_independent(x, merged):
    layer = layer_of()
    if merged:
        layer.merge()
    with torch.no_grad():
        before = layer(x)
        for other in copies(layer):
            assert torch.equal(other(x), before)
            assert other.weight is other.base.weight
            if merged:
                other.unmerge()
            other.weight.data.mul_(2)
            other.refresh()
            other.adapter.beta.mul_(3)
            assert not torch.equal(other(x), before)
            assert torch.equal(layer(x), before)


def test_copies_keep_the_norms_of_the_base(x, monkeypatch):
    calls = []
    original = wide.row_norms_sq
    monkeypatch.setattr("adapterzoo.base.row_norms_sq", lambda matrix: calls.append(1) or original(matrix))
    for other in copies(layer_of()):
        calls.clear()
        for _ in range(3):
            other(x)
        assert len(calls) == 1


def test_in_a_sequential_with_an_inplace_activation_and_checkpointing(x):
    model = nn.Sequential(layer_of(), nn.ReLU(inplace=True), nn.Linear(5, 2))
    model(x).sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any(name.startswith("0.adapter") for name in plain)
    for reentrant in (False, True):
        model.zero_grad()
        checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
        for name, parameter in model.named_parameters():
            if name in plain:
                torch.testing.assert_close(parameter.grad, plain[name])


def test_functional_call_vmap_and_grad(x):
    layer = layer_of(dtype=torch.float64)
    x = x.double()
    params = {name: p.detach() for name, p in layer.named_parameters()}
    adapter = {name: value for name, value in params.items() if name.startswith("adapter")}

    def loss(params, x):
        return torch.func.functional_call(layer, params, (x,)).square().sum()

    grads = torch.func.grad(loss)(adapter, x)
    layer(x).square().sum().backward()
    for name, parameter in layer.adapter.named_parameters():
        torch.testing.assert_close(grads[f"adapter.{name}"], parameter.grad)
    scaled = {name: 2 * value if name == "weight" else value for name, value in params.items()}
    assert not torch.equal(torch.func.functional_call(layer, scaled, (x,)), layer(x))
    single = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(adapter, x[:, None])
    torch.testing.assert_close(single["adapter.inner.magnitude"].sum(0), grads["adapter.inner.magnitude"])
    stacked = {name: torch.stack([value, 2 * value]) for name, value in params.items()}
    both = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(stacked)
    torch.testing.assert_close(both[0], layer(x))
    torch.testing.assert_close(both[1], torch.func.functional_call(layer, {n: v[1] for n, v in stacked.items()}, (x,)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own, of any Function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [LoRA(r=3), DEEP, MAP(FLoRA(r=3)), DoRA(AdaLoRA(r=2)), SORA(Full())], ids=repr)
def test_compiles_into_one_graph(spec, dtype, x):
    layer, x = layer_of(spec, dtype), x.to(dtype)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.adapter.parameters())
    with torch.no_grad():
        layer.weight.mul_(2)  # a compiled graph holds nothing of the old weight
    torch.testing.assert_close(compiled(x), layer(x))
    torch.compiler.reset()


def test_dtypes_follow_the_rule(x):
    layer = layer_of().half()
    assert layer.weight.dtype is torch.float16
    assert {p.dtype for p in layer.adapter.parameters()} == {torch.float32}
    assert layer(x.half()).dtype is torch.float16
    layer.double()
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    layer = layer_of(DEEP, torch.bfloat16, adapter_dtype=torch.bfloat16)
    dtypes = {name: value.dtype for name, value in layer.adapter.state_dict().items()}
    assert {name for name, dtype in dtypes.items() if dtype is torch.bfloat16} == {
        "inner.inner.inner.inner.A", "inner.inner.inner.inner.B"
    }  # fmt: skip
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    values = {name: value.clone() for name, value in layer.adapter.state_dict().items()}
    layer.to(torch.bfloat16)
    assert all(torch.equal(value, values[name]) for name, value in layer.adapter.state_dict().items())


def test_only_factors_are_pinned():
    layer = layer_of(DoRA(LoRA(r=2)), torch.float64, adapter_dtype=torch.float32)
    dtypes = {name: value.dtype for name, value in layer.adapter.state_dict().items()}
    assert dtypes == {"magnitude": torch.float64, "inner.A": torch.float32, "inner.B": torch.float32}
    layer(torch.randn(2, 7, dtype=torch.float64)).sum().backward()
    layer.float().double()
    assert {name: value.dtype for name, value in layer.adapter.state_dict().items()} == dtypes
    for bad in (torch.int32, torch.float64, "bf16"):
        with pytest.raises(SpecError, match=r"adapter_dtype=.* is not valid: it should be torch.bfloat16"):
            AdaptedLinear(nn.Linear(3, 3), LoRA(r=1), adapter_dtype=bad)


def test_a_16_bit_file_does_not_lower_the_adapters_precision():
    layer = layer_of()
    layer.load_state_dict({name: value.to(torch.bfloat16) for name, value in layer.state_dict().items()}, assign=True)
    assert layer.weight.dtype is torch.bfloat16
    assert {p.dtype for p in layer.adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("spec", [LoRA(r=2), DoRA(LoRA(r=2))], ids=repr)
@pytest.mark.parametrize("bias", [False, True])
def test_an_input_of_another_dtype_is_refused_as_by_torch(spec, bias):
    layer = layer_of(spec, torch.bfloat16, bias=bias)
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(
            RuntimeError, match=r"this layer has a weight of torch.bfloat16 and got an input of torch.float"
        ):
            layer(torch.randn(2, 7, dtype=dtype))
    with pytest.raises(RuntimeError):
        layer.base(torch.randn(2, 7))


def test_an_input_of_another_width_is_refused_by_name():
    layer = layer_of()
    layer.name = "up"
    for bad in (torch.randn(3, 6), torch.randn(8), torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match=r"layer 'up' takes inputs \[..., 7\]; got \["):
            layer(bad)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_inputs_keep_their_layout(layout):
    layer = layer_of(dtype=torch.float32)
    parts = [torch.randn(n, 7) for n in (2, 5, 1)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    y = layer(nested)
    assert y.layout == layout
    for part, result in zip(parts, y.unbind(), strict=True):
        torch.testing.assert_close(result, layer(part))
    if layout == torch.jagged:
        assert (y.sum(-1, keepdim=True) + nested).shape == nested.shape


def test_half_loses_no_digit_of_the_adapter():
    layer = layer_of()
    before = {name: value.clone() for name, value in layer.adapter.state_dict().items()}
    layer.half().float()
    assert all(torch.equal(value, before[name]) for name, value in layer.adapter.state_dict().items())


@pytest.mark.parametrize("spec", [LoRA(r=3), DEEP, DoRA(MAP(Full()))], ids=repr)
def test_autocast(spec, x):
    layer = layer_of(spec)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        weight = layer.effective_weight()
    assert y.dtype is torch.bfloat16
    assert torch.equal(weight, layer.effective_weight())
    torch.testing.assert_close(y.float(), exact, rtol=3e-2, atol=3e-2)
    y.sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in layer.adapter.parameters())


def test_meta_device_until_reset(x):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    az.adapt(model, MAP(DoRA(LoRA(r=2))), seed=3)
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(UninitialisedError, match=r"layer '0'.*reset_adapters"):
        model(x)
    with pytest.raises(UninitialisedError):
        az.reset_adapters(model)
    real = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    model.to_empty(device="cpu")
    with pytest.raises(UninitialisedError):
        model(x)
    model.load_state_dict(real.state_dict(), strict=False)
    az.reset_adapters(model)
    torch.testing.assert_close(model(x), real(x))
    direct = copy.deepcopy(real)
    az.adapt(direct, MAP(DoRA(LoRA(r=2))), seed=3)
    for name, value in direct.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_load_that_does_nothing_does_not_count():
    """Loading into meta parameters without assign=True is a no-op, of which torch only warns."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(7, 5))
    az.adapt(model, LoRA(r=2))
    donor = nn.Sequential(nn.Linear(7, 5))
    az.adapt(donor, LoRA(r=2))
    with pytest.warns(UserWarning, match="no-op"):
        model.load_state_dict(donor.state_dict())
    model.to_empty(device="cpu")
    with pytest.raises(UninitialisedError):
        model(torch.randn(2, 7))
    model.load_state_dict(donor.state_dict())
    model(torch.randn(2, 7))
    model.to("meta")
    with pytest.raises(UninitialisedError):
        model(torch.randn(2, 7, device="meta"))


def test_a_whole_checkpoint_also_initialises_a_meta_model(x):
    donor = nn.Sequential(nn.Linear(7, 5))
    az.adapt(donor, DoRA(LoRA(r=2)))
    with torch.no_grad():
        donor[0].adapter.inner.B.normal_()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(7, 5))
    az.adapt(model, DoRA(LoRA(r=2)))
    model.load_state_dict(donor.state_dict(), assign=True)
    assert torch.equal(model(x), donor(x))


def test_loading_a_base_refreshes_what_is_kept_of_it(x):
    layer, other = layer_of(DoRA(LoRA(r=2))), nn.Linear(7, 5)
    layer(x)
    layer.load_state_dict(other.state_dict(), strict=False)
    inside = other.weight + layer.adapter.inner.B @ layer.adapter.inner.A
    W = layer.adapter.magnitude[:, None] * inside / inside.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(x), x @ W.T + other.bias)
    with torch.no_grad():
        layer.weight.mul_(2)  # seen by its version
        inside = layer.weight + layer.adapter.inner.B @ layer.adapter.inner.A
    torch.testing.assert_close(layer.effective_weight().norm(dim=1), layer.adapter.magnitude.abs())
    layer.weight.data *= 3  # not seen; so there is refresh
    az.refresh(layer)
    torch.testing.assert_close(layer.effective_weight().norm(dim=1), layer.adapter.magnitude.abs())


def test_a_base_that_trains_has_its_gradient_and_says_so_once(x):
    layer = layer_of(DoRA(LoRA(r=2), detach_norm=False), torch.float64)
    layer.weight.requires_grad_()
    layer.bias.requires_grad_()
    names = ["weight", "bias"]
    values = [layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_()]

    def call(*values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x.double(),))

    with pytest.warns(UnfrozenBaseWarning, match="the base weight of this layer trains"):
        layer(x.double())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.autograd.gradcheck(call, values)
    optimiser = torch.optim.AdamW([layer.weight], lr=0.1, fused=True)
    layer(x.double()).square().sum().backward()
    optimiser.step()
    layer.weight.requires_grad_(False)
    torch.testing.assert_close(layer.effective_weight().norm(dim=1), layer.adapter.magnitude.abs())


def test_a_fused_step_that_the_adapter_does_not_see(x):
    layer = layer_of(DoRA(LoRA(r=2)))
    layer(x)
    layer.weight.requires_grad_(True)
    optimiser = torch.optim.AdamW([layer.weight], lr=0.5, fused=True)
    with az.disabled(layer):
        layer(x).square().sum().backward()
    optimiser.step()
    layer.weight.requires_grad_(False)
    torch.testing.assert_close(layer.effective_weight().norm(dim=1), layer.adapter.magnitude.abs())


def test_a_new_weight_has_new_norms(x):
    layer = layer_of(DoRA(LoRA(r=2)))
    for _ in range(6):
        layer.weight = nn.Parameter(torch.randn(5, 7), requires_grad=False)
        torch.testing.assert_close(layer.effective_weight().norm(dim=1), layer.adapter.magnitude.abs())
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(5, 7), requires_grad=False))
    torch.testing.assert_close(layer.effective_weight().norm(dim=1), layer.adapter.magnitude.abs())


def test_pruned_or_parametrised_afterwards_cannot_be_merged(x):
    for spoil in (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity()),
    ):
        model = nn.Sequential(layer_of(LoRA(r=2)))
        spoil(model[0])
        for operation in (
            lambda m: az.merge(m),
            lambda m: az.unload(m, merge=True),
            lambda m: az.unload(m, merge=False),
        ):
            with pytest.raises(MergedError, match="pruned or parametrised after it was adapted"):
                operation(model)
        assert "adapter" in dict(model[0].named_children())


def test_backward_hooks_survive_unload(x):
    model, calls = nn.Sequential(nn.Linear(7, 5)), []
    az.adapt(model, LoRA(r=2))
    model[0].register_full_backward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        model(x.clone().requires_grad_()).sum().backward()
        az.unload(model, merge=True) if calls == [1] else None
    assert calls == [1, 1]


def test_a_copy_made_while_disabled_is_not_disabled(x):
    layer = layer_of()
    with az.disabled(layer):
        other = copy.deepcopy(layer)
    assert torch.equal(other(x), layer(x))


def test_a_default_device_does_not_reach_the_draws():
    model = nn.Sequential(nn.Linear(7, 5))
    with torch.device("meta"):
        az.adapt(model, MAP(LoRA(r=2)))
    assert not any(p.is_meta for p in model.parameters())
    other = nn.Sequential(nn.Linear(7, 5))
    az.adapt(other, MAP(LoRA(r=2)))
    assert torch.equal(model[0].adapter.inner.A, other[0].adapter.inner.A)


def test_a_meta_adapter_over_a_loaded_base_is_materialised_by_reset(x):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(7, 5))
    az.adapt(model, DoRA(LoRA(r=2)))
    real = nn.Sequential(nn.Linear(7, 5))
    model.load_state_dict(real.state_dict(), strict=False, assign=True)
    with pytest.raises(UninitialisedError):
        model(x)
    az.reset_adapters(model)
    torch.testing.assert_close(model(x), real(x))


def test_the_merged_state(x):
    layer = layer_of()
    layer.name = "blocks.3.up"
    base = layer.weight.detach().clone()
    layer.merge()
    assert layer.merged
    assert "merged" in repr(layer)
    assert torch.equal(layer.unmerged_weight, base)
    with pytest.raises(MergedError, match=r"'blocks.3.up' is merged.*torch.no_grad"):
        layer(x)
    with pytest.raises(MergedError, match=r"'blocks.3.up' is already merged"):
        layer.merge()
    with pytest.raises(MergedError, match="unmerge it before resetting"):
        layer.reset()
    state = layer.state_dict()
    assert set(state) == set(layer_of().state_dict())
    adapter = {name: value.clone() for name, value in layer.adapter.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"'blocks.3.up' is merged and takes no values"):
        layer.load_state_dict(layer_of(seed=5).state_dict())
    with pytest.raises(RuntimeError, match="this adapter belongs to a merged layer"):
        layer.adapter.load_state_dict(layer_of(seed=5).adapter.state_dict())
    assert all(torch.equal(value, adapter[name]) for name, value in layer.adapter.state_dict().items())
    with az.disabled(layer), torch.no_grad():
        assert torch.equal(layer(x), nn.functional.linear(x, base, layer.bias))
    layer.unmerge()
    assert torch.equal(layer.weight, base)
    with pytest.raises(MergedError, match="is not merged"):
        layer.unmerge()
    layer.requires_grad_(False)
    layer.merge()
    assert layer(x).shape == (4, 5)  # no adapter parameter wants a gradient


def test_merge_without_keeping_the_base(x):
    layer = layer_of()
    effective = layer.effective_weight().detach()
    layer.merge(keep_base=False)
    assert torch.equal(layer.weight, effective)
    for operation in (layer.unmerge, layer.state_dict, layer.effective_weight):
        with pytest.raises(MergedError, match="keep_base=False"):
            operation()


def test_the_base_is_kept_where_it_was_asked_for():
    layer = layer_of()
    layer.merge(base_device="cpu")
    layer.to(torch.float64)
    assert layer.unmerged_weight.dtype is torch.float64
    layer.unmerge()
    assert layer.weight.dtype is torch.float64
    before = layer.weight.detach().clone()
    with pytest.raises(MergedError, match="the meta device can't keep a base weight"):
        layer.merge(base_device="meta")
    assert not layer.merged
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_failing_merge_changes_nothing(bad):
    model = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7))
    az.adapt(model, LoRA(r=2))
    with torch.no_grad():
        model[1].adapter.B.fill_(bad)
    before = copy.deepcopy(model.state_dict())
    for operation in (lambda: az.merge(model), lambda: az.unload(model, merge=True)):
        with pytest.raises(MergedError, match="layer '1' has an effective weight that is not finite"):
            operation()
        assert not any(layer.merged for layer in az.adapted_layers(model).values())
        assert isinstance(model[0], AdaptedLinear)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) or bad != bad


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            lambda: nn.ConvTranspose2d(3, 4, 2),
            "a ConvTranspose2d and can't be adapted: layers of its class can't be; nn.Linear, nn.Conv1d",
        ),
        (lambda: nn.LazyLinear(4), "shape is not known yet"),
        (lambda: parametrizations.weight_norm(nn.Linear(3, 4)), "remove the parametrisation"),
        (lambda: type("Odd", (nn.Linear,), {"forward": lambda self, x: x})(3, 4), "forward of its own"),
        (lambda: with_buffer(nn.Linear(3, 4)), "would lose: scale"),
        (lambda: with_forward(nn.Linear(3, 4)), "forward of its own"),
        (lambda: nn.Linear(3, 4).to(torch.float8_e5m2), "Parameter of torch.float8_e5m2, not an ordinary matrix"),
        (lambda: AdaptedLinear(nn.Linear(3, 4), LoRA(r=1)), "adapted already"),
    ],
)
def test_unsupported_bases_are_refused(base, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = base()
    with pytest.raises(UnsupportedLayerError, match=message):
        AdaptedLinear(module, LoRA(r=1))


def test_specs_that_do_not_fit_are_refused():
    linear = nn.Linear(7, 5)
    with pytest.raises(
        MisfitError, match=r"layer 'up' \(out=5, in=7\) cannot take MAP.*r=6 is above min\(out, in\) = 5"
    ):
        AdaptedLinear(linear, MAP(LoRA(r=6)), name="up")
    with pytest.raises(MisfitError, match="r_out=6 is above out = 5"):
        AdaptedLinear(linear, FLoRA(r=(6, 1)))
    with pytest.raises(MisfitError, match="rank=8 is above out = 5"):
        AdaptedLinear(linear, SORA(LoRA(r=1), rank=8))
    with pytest.raises(SpecError, match=r"this layer needs a spec, but got the class LoRA; build it: LoRA\(...\)"):
        AdaptedLinear(linear, LoRA)
    with pytest.raises(SpecError, match="needs a spec such as"):
        AdaptedLinear(linear, "LoRA(r=2)")
    assert linear.weight.requires_grad
    assert not linear._forward_pre_hooks


def test_dropout_acts_in_training_only(x):
    layer = layer_of(DoRA(LoRA(r=3, dropout=0.5)))
    torch.manual_seed(0)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train()
    many = layer(x[:1].expand(40_000, 7)).detach().double()
    spread = many.std(0) / 40_000**0.5
    assert ((many.mean(0) - layer.eval()(x[:1]).double()).abs() < 5 * spread).all()
    assert (spread > 0).all()


def test_inference_mode_and_frozen_adapters(x):
    layer = layer_of()
    expected = layer(x).detach()
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_layers_made_or_refreshed_in_inference_mode_train_afterwards(x):
    layer = layer_of(MAP(DoRA(LoRA(r=2))))
    layer.refresh()
    with torch.inference_mode():
        layer(x)
        AdaptedLinear(nn.Linear(4, 3), DoRA(LoRA(r=2)))(torch.ones(4))
        layer.merge()
    layer.unmerge()
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.adapter.parameters())


def test_ensembles_over_a_16_bit_weight():
    layer = layer_of(DoRA(SORA(LoRA(r=2))), torch.bfloat16)
    x = torch.randn(4, 7).bfloat16()
    one = {f"adapter.{name}": p.detach() for name, p in layer.adapter.named_parameters()}
    stacked = {name: torch.stack([value, 1.5 * value]) for name, value in one.items()}

    def loss(params):
        return torch.func.functional_call(layer, params, (x,)).float().square().sum()

    both = torch.func.vmap(torch.func.grad(loss))(stacked)
    for i in range(2):
        alone = torch.func.grad(loss)({name: value[i] for name, value in stacked.items()})
        for name, value in alone.items():
            torch.testing.assert_close(both[name][i], value, rtol=2e-2, atol=2e-2 * float(value.abs().max()))


@pytest.mark.parametrize("bias", [False, True])
def test_autocast_rounds_once_and_keeps_the_factors_wide(x, bias):
    layer = layer_of(DoRA(LoRA(r=3)), bias=bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        inside = layer.factored_weight()
        assert torch.equal(layer.delta_weight(), layer_of(DoRA(LoRA(r=3)), bias=bias).delta_weight())
    z = (x.bfloat16() @ layer.weight.bfloat16().T).float()
    h = (x.bfloat16() @ inside.V.value.bfloat16().T).float()
    expected = z + inside.delta * z + h @ inside.U.T + (0 if layer.bias is None else layer.bias)
    assert torch.equal(y, expected.bfloat16())


def test_a_16_bit_layer_takes_float32_inputs_under_autocast(x):
    layer = layer_of(DoRA(LoRA(r=3)), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer(x.bfloat16()))


def test_modes_are_taken_over_and_given_back():
    layer = AdaptedLinear(nn.Linear(4, 3).eval(), LoRA(r=2, dropout=0.5))
    assert not layer.training
    assert not layer.adapter.training
    base_layer = nn.Linear(4, 3)
    model = nn.Sequential(base_layer)
    az.adapt(model, LoRA(r=2))
    model.eval()
    az.unload(model, merge=False)
    assert not base_layer.training


def test_reset_draws_what_the_constructor_draws():
    layer = layer_of(SORA(LoRA(r=2)), seed=3)
    fresh = AdaptedLinear(nn.Linear(7, 5), SORA(LoRA(r=2)), seed=3)
    layer.reset()
    assert torch.equal(layer.adapter.C, fresh.adapter.C)
    assert layer.adapter.C.data_ptr() != layer.adapter.D.data_ptr()
    layer.reset(seed=0)
    assert layer.seed == 0
    assert not torch.equal(layer.adapter.C, fresh.adapter.C)
    with pytest.raises(SpecError, match=r"seed=1.5 is not valid"):
        layer.reset(seed=1.5)


def test_a_seed_is_the_number_that_it_is():
    class Three:
        def __index__(self):
            return 3

    A = AdaptedLinear(nn.Linear(7, 5), LoRA(r=2), seed=3).adapter.A
    assert torch.equal(A, AdaptedLinear(nn.Linear(7, 5), LoRA(r=2), seed=Three()).adapter.A)


def test_streams_are_many_and_meta_layers_draw_nothing(monkeypatch):
    site = layer_of().site()
    seeds = {replace(site, layer=str(i))._stream("A").initial_seed() for i in range(2000)}
    assert len(seeds) == 2000
    values = site.kaiming_uniform("A", 10_000, fan=3).abs().max()
    assert 0.575 < float(values) < 3**-0.5
    monkeypatch.setattr(type(site), "_stream", lambda self, parameter: 1 / 0)
    with torch.device("meta"):
        AdaptedLinear(nn.Linear(7, 5), DEEP)


def test_pinned_dtypes_hold_for_gradients_and_loaded_files():
    for spec, factors in ((DoRA(AdaLoRA(r=2)), {"inner.P", "inner.lam", "inner.Q"}), (DoRA(Full()), {"inner.delta"})):
        layer = layer_of(spec, torch.bfloat16, adapter_dtype=torch.bfloat16)
        layer(torch.randn(2, 7).bfloat16()).sum().backward()
        layer.double()
        layer.load_state_dict({name: v.float() for name, v in layer.state_dict().items()}, assign=True)
        for name, parameter in layer.adapter.named_parameters():
            assert (parameter.dtype is torch.bfloat16) == (name in factors), name
    layer = layer_of(LoRA(r=2), torch.bfloat16, adapter_dtype=torch.bfloat16)
    layer(torch.randn(2, 7).bfloat16()).sum().backward()
    layer.double()
    assert layer.adapter.A.grad.dtype is torch.bfloat16


def test_half_a_file_does_not_initialise():
    with torch.device("meta"):
        layer = AdaptedLinear(nn.Linear(7, 5), LoRA(r=3))
    state = layer_of(LoRA(r=3)).state_dict()
    del state["adapter.B"]
    layer.to_empty(device="cpu")
    layer.load_state_dict(state, strict=False)
    with pytest.raises(UninitialisedError):
        layer(torch.randn(2, 7))


def test_an_infinite_magnitude_is_not_merged():
    layer = layer_of(MAP(LoRA(r=2)))
    with torch.no_grad():
        layer.adapter.beta.fill_(float("inf"))
        layer.adapter.inner.B.zero_()
        layer.adapter.inner.B[0, 0] = 1
    with pytest.raises(MergedError, match="not finite"):
        layer.merge()


def test_unmerging_frees_what_was_kept():
    layer = layer_of()
    layer.merge()
    layer.unmerge()
    assert layer.unmerged_weight is None


def test_jagged_inputs_with_holes_are_refused():
    whole = torch.nested.nested_tensor([torch.randn(4, 7), torch.randn(4, 7)], layout=torch.jagged)
    holes = torch.nested.narrow(
        torch.randn(2, 4, 7), 1, torch.tensor([0, 1]), torch.tensor([2, 3]), layout=torch.jagged
    )
    layer = layer_of()
    layer(whole)
    with pytest.raises(RuntimeError, match="takes contiguous jagged inputs"):
        layer(holes)


@pytest.mark.parametrize(
    "register",
    [
        lambda module, hook: module.register_forward_hook(hook),
        lambda module, hook: module.register_forward_hook(hook, with_kwargs=True),
        lambda module, hook: module.register_forward_hook(hook, always_call=True),
        lambda module, hook: module.register_forward_pre_hook(hook),
        lambda module, hook: module.register_forward_pre_hook(hook, with_kwargs=True),
        lambda module, hook: module.register_full_backward_hook(hook),
        lambda module, hook: module.register_full_backward_pre_hook(hook),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_every_kind_of_hook_fires_before_while_and_after(register, when, x):
    linear, calls = nn.Linear(7, 5), []

    def hook(*arguments):
        calls.append(len(arguments))

    model = nn.Sequential(linear)
    if when == "before":
        register(linear, hook)
    az.adapt(model, LoRA(r=2))
    if when == "after":
        register(model[0], hook)
    model(x.clone().requires_grad_()).sum().backward()
    az.unload(model, merge=True)
    model(x.clone().requires_grad_()).sum().backward()
    assert len(calls) == 2
    assert calls[0] == calls[1]


@pytest.mark.parametrize("kind", ["_state_dict_pre_hooks", "_load_state_dict_post_hooks"])
def test_bases_with_file_hooks_or_parts_are_refused(kind):
    linear = nn.Linear(3, 4)
    if kind == "_state_dict_pre_hooks":
        linear.register_state_dict_pre_hook(lambda *_: None)
    else:
        linear.register_load_state_dict_post_hook(lambda *_: None)
    with pytest.raises(UnsupportedLayerError, match=kind):
        AdaptedLinear(linear, LoRA(r=1))
    linear = nn.Linear(3, 4)
    linear.part = nn.ReLU()
    with pytest.raises(UnsupportedLayerError, match="would lose: part"):
        AdaptedLinear(linear, LoRA(r=1))
    with pytest.raises(SpecError, match="adapter_dtype"):
        AdaptedLinear(nn.Linear(3, 4), LoRA(r=1), adapter_dtype=torch.float16)


def test_a_failing_init_leaves_the_base_as_it_was(monkeypatch):
    linear = nn.Linear(3, 4)

    def interrupted(self, site):
        raise KeyboardInterrupt

    monkeypatch.setattr(LoRA, "init", interrupted)
    with pytest.raises(KeyboardInterrupt):
        AdaptedLinear(linear, LoRA(r=1))
    assert linear.weight.requires_grad
    assert linear.bias.requires_grad
    assert not linear._forward_pre_hooks


@pytest.mark.parametrize("other", [AdaLoRA(r=2), LoRA(r=2), MAP(DoRA(LoRA(r=2)))], ids=repr)
def test_a_state_of_another_composition_is_an_error_also_where_loading_is_lax(other):
    """Trainers load with strict=False: what is missing or unexpected would be a line in a log."""
    model = nn.Sequential(AdaptedLinear(nn.Linear(7, 5), DoRA(LoRA(r=2)), name="0"))
    state = nn.Sequential(AdaptedLinear(nn.Linear(7, 5), other)).state_dict()
    with pytest.raises(RuntimeError, match=r"'0' has an adapter with inner\.A, .*another composition than DoRA\(LoRA"):
        model.load_state_dict(state, strict=False)
    base = {key: value for key, value in state.items() if "adapter" not in key}
    assert model.load_state_dict(base, strict=False).missing_keys == ["0.adapter.magnitude", "0.adapter.inner.A",
                                                                      "0.adapter.inner.B"]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # torch says that tracing is deprecated, and of each shape that it is fixed
@pytest.mark.parametrize("spec", [DoRA(LoRA(r=2)), MAP(AdaLoRA(r=2)), SORA(PreDiag(FLoRA(r=2)))], ids=repr)
def test_it_can_be_traced(x, spec):
    layer = layer_of(spec).eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(layer, x)(2 * x), layer(2 * x))


def test_a_skeleton_on_the_meta_device_computes_with_values_that_are_given(x):
    """The recipe of ensembles: a copy on the meta device, and the values of several models."""
    layers = [layer_of(seed=seed) for seed in range(3)]
    base = copy.deepcopy(layers[0]).to("meta")
    values = torch.func.stack_module_state(layers)
    together = torch.func.vmap(lambda *given: torch.func.functional_call(base, given, (x,)))(*values)
    for one, layer in zip(together, layers, strict=True):
        torch.testing.assert_close(one, layer(x))
    with pytest.raises(UninitialisedError):
        base.to_empty(device="cpu")(x)
