"""Convolutions, transposed linear layers and embeddings: the same identities as of linear layers, and their own."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kinds import LayerTruth, layers, size
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import adapterzoo as az
from adapterzoo import MAP, SORA, AdaLoRA, AdaptedLinear, DoRA, FLoRA, Full, LoRA, PreDiag
from adapterzoo.errors import InputError, MisfitError, SpecError, TargetError, UnsupportedLayerError
from adapterzoo.kernel import Dropout

# torch says so of some of its own kernels, whoever calls them.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

FORWARD = {torch.float64: 1e-14, torch.float32: 3e-6, torch.bfloat16: 3e-2}


def close(actual, expected, scale, tolerance, what, case):
    assert torch.isfinite(actual).all(), f"{what} is not finite: {case}"
    assert actual.shape == expected.shape
    error = size(actual.detach().double() - expected.detach())
    assert error <= tolerance * max(scale, 1e-300), f"{what}: {error:.3g} above {tolerance * scale:.3g} ({case})"


@given(layers())
def test_forward_and_effective_weight_are_the_dense_ones(case):
    layer, x = case.layer(), case.input()
    truth = LayerTruth(case, layer)
    close(layer(x), truth.forward(x), truth.output_scale(x), 1e-14, "forward", case)
    stored = case.stored(truth.weight, layer.weight)
    close(layer.effective_weight(), stored, truth.scale, 1e-14, "effective weight", case)
    close(layer.delta_weight(), case.stored(truth.update, layer.weight), truth.scale, 1e-14, "delta weight", case)


@given(st.one_of(layers(dtype=torch.float32), layers(dtype=torch.bfloat16)))
def test_narrow_weights_give_the_same_to_their_own_precision(case):
    layer, x = case.layer(), case.input()
    truth = LayerTruth(case, layer)
    y = layer(x)
    assert y.dtype == case.dtype
    close(y, truth.forward(x), truth.output_scale(x), FORWARD[case.dtype], "forward", case)


@given(layers())
def test_gradients_are_those_of_the_dense_form(case):
    layer, x = case.layer(), case.input()
    x = x if x.dtype == torch.int64 else x.requires_grad_()
    y = layer(x)
    weights = torch.randn(y.shape, generator=case.draw(4), dtype=torch.float64)
    (y * weights).sum().backward()
    truth = LayerTruth(case, layer)
    x_true = x.detach().clone() if x.dtype == torch.int64 else x.detach().clone().requires_grad_()
    truth.weight.retain_grad()
    (truth.forward(x_true) * weights).sum().backward()
    if x.dtype != torch.int64:
        close(x.grad, x_true.grad, size(weights) * truth.scale, 1e-13, "gradient of x", case)
    work = size(truth.weight.grad) * truth.scale
    for name, parameter in layer.adapter.named_parameters():
        expected = truth.leaves[name].grad
        expected = torch.zeros_like(truth.leaves[name]) if expected is None else expected
        scale = size(expected) * truth.kappa + work / max(size(parameter), 1e-30)
        close(parameter.grad, expected, scale, 1e-13, f"gradient of {name}", case)
    assert layer.weight.grad is None


@given(layers())
def test_merging_keeps_the_forward_and_unmerging_gives_the_bits_back(case):
    layer, x = case.layer(), case.input()
    truth, before = LayerTruth(case, layer), layer.weight.detach().clone()
    strides = layer.weight.stride()
    with torch.no_grad():
        plain = layer(x)
        layer.merge()
        assert layer.weight.stride() == strides
        close(layer(x), plain.double(), truth.output_scale(x), 2e-14, "merged forward", case)
        assert torch.equal(layer.state_dict()["weight"], before)
        with az.disabled(layer):
            close(layer(x), truth.forward(x, truth.W), truth.output_scale(x), 1e-14, "disabled", case)
        layer.unmerge()
        assert torch.equal(layer.weight, before)
        assert torch.equal(layer(x), plain)


@given(layers())
def test_the_start_is_exact_and_files_give_the_same_bits(case):
    layer, x = case.layer(perturbed=False), case.input()
    assert not layer.delta_weight().any()
    assert torch.equal(layer.effective_weight(), layer.weight)
    truth = LayerTruth(case, layer)
    close(layer(x), truth.forward(x), truth.output_scale(x), 1e-14, "first forward", case)
    trained, other = case.layer(), copy.deepcopy(layer)
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other(x), trained(x))
    plain = case.plain()
    assert torch.equal(az.unload(trained, merge=False)(x), plain(x))


@given(layers(dropout=0.4))
def test_dropout_acts_on_the_generators_own_part(case):
    layer, x = case.layer(), case.input()
    torch.manual_seed(case.seed)
    if case.kind == "embedding":
        keep = (torch.rand(x.shape) >= 0.4).double()[..., None] / 0.6
    else:
        drop = Dropout.draw(x, 0.4, 1)
        keep = (~drop.dropped).double() / (1 - drop.p)
    torch.manual_seed(case.seed)
    y = layer.train()(x)
    truth = LayerTruth(case, layer)
    if case.kind == "embedding":
        own = truth.forward(x, truth.part)
        expected = truth.forward(x) + own * keep - own
    else:
        expected = truth.forward(x) + truth.forward(x * keep - x, truth.part, bias=False)
    close(y, expected, 4 * truth.output_scale(x), 1e-14, "train with dropout", case)
    close(layer.eval()(x), truth.forward(x), truth.output_scale(x), 1e-14, "eval with dropout", case)


def conv(inside=4, outside=6, size=3, **options):
    torch.manual_seed(0)
    return nn.Conv2d(inside, outside, size, **options)


def perturbed(layer, seed=0):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return layer


class TestTucker:
    """FLoRA keeps its four-way form on a convolution."""

    def test_its_parameters_are_the_factors_of_every_mode(self):
        layer = AdaptedLinear(conv(groups=2), FLoRA(r=(5, 2, 3, 1)))
        shapes = {name: tuple(p.shape) for name, p in layer.adapter.named_parameters()}
        assert shapes == {"A": (6, 5), "core": (5, 2, 3, 1), "B": (2, 2), "K1": (3, 3), "K2": (1, 3)}

    def test_without_ranks_for_the_kernel_its_modes_stay_whole(self):
        layer = AdaptedLinear(conv(), FLoRA(r=3))
        shapes = {name: tuple(p.shape) for name, p in layer.adapter.named_parameters()}
        assert shapes == {"A": (6, 3), "core": (3, 3, 3, 3), "B": (3, 4)}

    def test_the_forward_goes_in_three_steps_and_equals_the_dense_kernel(self, monkeypatch):
        layer = perturbed(AdaptedLinear(conv(8, 9, groups=1, padding=1), FLoRA(r=(2, 3, 2, 2))))
        kernels = []
        for name in ("conv2d",):
            original = getattr(torch.nn.functional, name)

            def seen(x, kernel, *arguments, original=original, **options):
                kernels.append(tuple(kernel.shape))
                return original(x, kernel, *arguments, **options)

            monkeypatch.setattr(torch.nn.functional, name, seen)
            monkeypatch.setitem(az.forms.convolution._CONVOLVE, 2, seen)
        x = torch.randn(2, 8, 5, 5)
        y = layer(x)
        assert kernels == [(9, 8, 3, 3), (3, 8, 1, 1), (2, 3, 3, 3), (9, 2, 1, 1)]
        monkeypatch.undo()
        p = layer.adapter
        kernel = torch.einsum("abcd,oa,bi,ch,dw->oihw", p.core, p.A, p.B, p.K1, p.K2) + layer.weight
        dense = nn.functional.conv2d(x, kernel, layer.bias, padding=1)
        torch.testing.assert_close(y, dense, atol=2e-5, rtol=1e-5)

    def test_on_one_by_one_kernels_it_is_the_linear_form(self):
        plain = conv(size=1)
        line = nn.Linear(4, 6)
        line.load_state_dict({"weight": plain.weight.flatten(1), "bias": plain.bias})
        on_conv, on_line = (AdaptedLinear(base, FLoRA(r=(3, 2))) for base in (plain, line))
        perturbed(on_line)
        state = on_line.state_dict()
        on_conv.load_state_dict({name: v.reshape(on_conv.state_dict()[name].shape) for name, v in state.items()})
        x = torch.randn(2, 4, 5, 5)
        torch.testing.assert_close(on_conv(x), on_line(x.movedim(1, -1)).movedim(-1, 1), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        ("r", "message"),
        [
            ((7, 2), r"r_out=7 is above out = 6"),
            (3, r"r_in=3 is above in/groups = 2"),
            ((3, 2, 4, 1), r"r_kh=4 is above kh = 3"),
            ((3, 2, 1, 4), r"r_kw=4 is above kw = 3"),
            ((3, 2, 1), r"r=\(3, 2, 1\) has 3 ranks, and the weight 4 modes: out = 6, in/groups = 2, kh = 3, kw = 3"),
        ],
    )
    def test_every_rank_is_checked_against_its_mode(self, r, message):
        with pytest.raises(MisfitError, match=message):
            AdaptedLinear(conv(groups=2), FLoRA(r=r))

    def test_a_linear_layer_has_no_kernel_to_factor(self):
        with pytest.raises(MisfitError, match=r"has 4 ranks, and the weight 2 modes: out = 6, in = 4"):
            AdaptedLinear(nn.Linear(4, 6), FLoRA(r=(2, 2, 1, 1)))

    def test_a_pair_of_equal_ranks_is_one_rank_and_a_quadruple_is_itself(self):
        assert FLoRA(r=(4, 4)) == FLoRA(r=4)
        assert az.parse("FLoRA(r=(4, 4, 2, 2))").ranks == (4, 4, 2, 2)
        with pytest.raises(SpecError, match="r_kh"):
            FLoRA(r=(1, 1, 1, 1, 1, 1))


class TestConvolutions:
    def test_a_depthwise_layer_forms_its_kernel_and_a_wide_one_does_not(self):
        shapes = []
        for base in (conv(32, 32, groups=32), conv(32, 32)):
            layer = perturbed(AdaptedLinear(base, LoRA(r=1)))
            counted = FlopCounterMode(display=False)
            with counted, torch.no_grad():
                layer(torch.randn(1, 32, 8, 8))
            places, kernel = 36, base.weight.numel()
            shapes.append(counted.get_total_flops() / (2 * places * kernel))
        depthwise, wide = shapes
        assert depthwise == pytest.approx(2, abs=0.1)  # the kernel once more, and its forming
        assert wide == pytest.approx(1 + 1 / 32 + 1 / 288, abs=1e-3)

    def test_norms_are_of_filters_or_of_the_whole_kernel(self):
        base = conv(groups=2)
        filters = base.weight.detach().flatten(1).norm(dim=1)
        torch.testing.assert_close(AdaptedLinear(base, DoRA(LoRA(r=2))).adapter.magnitude.detach(), filters)
        whole = AdaptedLinear(conv(groups=2), MAP(LoRA(r=2))).adapter
        torch.testing.assert_close(whole.alpha.detach(), base.weight.detach().norm()[None])
        by_channel = AdaptedLinear(conv(groups=2), MAP(LoRA(r=2), per="channel")).adapter
        torch.testing.assert_close(by_channel.alpha.detach(), filters)
        assert torch.equal(by_channel.beta.detach(), torch.ones(6))

    def test_a_channels_last_layer_keeps_its_strides_when_merged(self):
        layer = AdaptedLinear(conv().to(memory_format=torch.channels_last), LoRA(r=2))
        perturbed(layer).merge()
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)

    def test_what_models_read_of_their_layers_is_there(self):
        layer = AdaptedLinear(conv(stride=2, padding=1), LoRA(r=2))
        assert (layer.stride, layer.in_channels, layer.kernel_size) == ((2, 2), 4, (3, 3))
        assert "Conv2d" not in repr(layer)
        assert "4, 6, kernel_size=(3, 3), stride=(2, 2)" in repr(layer)
        with pytest.raises(AttributeError, match="strides"):
            _ = layer.strides

    @pytest.mark.parametrize(
        ("shape", "message"),
        [((2, 5, 7, 7), r"takes inputs \[batch, 4, H, W\]; got \[2, 5, 7, 7\]"), ((4, 7), "takes inputs")],
    )
    def test_inputs_of_another_shape_are_refused_by_name(self, shape, message):
        layer = AdaptedLinear(conv(), LoRA(r=2), name="stem")
        with pytest.raises(InputError, match="layer 'stem' " + message):
            layer(torch.randn(shape))
        with pytest.raises(InputError, match=r"got an input of torch\.float64"):
            layer(torch.randn(1, 4, 7, 7, dtype=torch.float64))

    @pytest.mark.parametrize("spec", [LoRA(r=2, alpha=3), DoRA(LoRA(r=2)), MAP(FLoRA(r=2)), Full()], ids=repr)
    def test_autocast_and_checkpointing_train_as_without(self, spec):
        layer = perturbed(AdaptedLinear(conv(), spec))
        x = torch.randn(2, 4, 7, 7)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), atol=0.08, rtol=0.05)
        layer(x).sum().backward()
        plain = {name: p.grad.clone() for name, p in layer.adapter.named_parameters()}
        layer.zero_grad()
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
        for name, parameter in layer.adapter.named_parameters():
            torch.testing.assert_close(parameter.grad, plain[name])

    @pytest.mark.parametrize("spec", [LoRA(r=2), SORA(DoRA(FLoRA(r=(2, 2, 1, 1))))], ids=repr)
    def test_it_compiles_in_one_graph(self, spec):
        layer = perturbed(AdaptedLinear(conv(), spec))
        x = torch.randn(2, 4, 7, 7)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))


def test_map_per_channel_holds_its_identity_for_every_filter():
    layer = AdaptedLinear(conv(), MAP(LoRA(r=2), per="channel"))
    with torch.no_grad():
        layer.adapter.inner.B.normal_()
        layer.adapter.beta.copy_(torch.linspace(0.5, 2, 6))
        layer.adapter.alpha.mul_(1.3)
    W, weight = layer.weight.flatten(1), layer.factored_weight().dense()
    rest = weight - layer.adapter.alpha[:, None] * W / W.norm(dim=1, keepdim=True)
    torch.testing.assert_close(rest.norm(dim=1), layer.adapter.beta.detach(), atol=1e-5, rtol=1e-5)


def test_per_channel_and_per_matrix_are_two_specs():
    with pytest.raises(SpecError, match="per='filter' is not valid: it should be 'matrix' or 'channel'"):
        MAP(LoRA(r=2), per="filter")
    assert az.parse("MAP(LoRA(r=2), per='channel')").per == "channel"


class TestEmbeddings:
    def test_the_factor_of_a_one_hot_input_is_drawn_for_one_input(self):
        torch.manual_seed(0)
        layer = AdaptedLinear(nn.Embedding(1000, 16), LoRA(r=4))
        A = layer.adapter.A.detach()
        assert A.shape == (4, 1000)
        assert 0.98 < float(A.abs().max()) <= 1

    def test_dora_has_one_magnitude_for_every_dimension(self):
        base = nn.Embedding(9, 4)
        magnitude = AdaptedLinear(base, DoRA(LoRA(r=2))).adapter.magnitude.detach()
        torch.testing.assert_close(magnitude, base.weight.detach().norm(dim=0))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_norm": 2.0}, "max_norm=2.0 rescales its weight in every forward"),
            ({"scale_grad_by_freq": True}, "build it with scale_grad_by_freq=False"),
            ({"sparse": True}, "build it with sparse=False"),
        ],
    )
    def test_options_that_act_on_a_trained_weight_are_refused(self, options, message):
        with pytest.raises(UnsupportedLayerError, match=message):
            AdaptedLinear(nn.Embedding(9, 4, **options), LoRA(r=2))

    def test_inputs_that_are_no_indices_are_refused(self):
        with pytest.raises(InputError, match=r"takes indices \(torch.long or torch.int\); got torch.float32"):
            AdaptedLinear(nn.Embedding(9, 4), LoRA(r=2))(torch.zeros(3))

    def test_padding_trains_nothing(self):
        layer = perturbed(AdaptedLinear(nn.Embedding(9, 4, padding_idx=2), PreDiag(LoRA(r=2))))
        layer(torch.full((3,), 2)).square().sum().backward()
        assert all(not p.grad.any() for p in layer.adapter.parameters())
        layer(torch.tensor([2, 3])).square().sum().backward()
        assert all(p.grad.any() for p in layer.adapter.parameters())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.mix = Conv1D(6, 8)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        x = self.mix(self.conv(self.embed(ids).mT).mT)
        return self.head(x + self.attend(x, x, x)[0])


def test_all_linear_means_linear_layers_stored_either_way():
    plan = az.adapt(Net(), LoRA(r=2))
    assert [item.names[0] for item in plan.adapted] == ["mix", "head"]
    assert [(item.name, "MultiheadAttention" in item.reason) for item in plan.left_alone] == [("attend.out_proj", True)]


def test_other_kinds_are_adapted_where_they_are_named():
    model, ids = Net(), torch.tensor([[1, 2, 3]])
    plan = az.adapt(model, MAP(DoRA(LoRA(r=2))), targets=["embed", "conv", "mix"])
    plan.verify(ids)
    assert [(i.names[0], i.shape) for i in plan.adapted] == [
        ("embed", (8, 11, ())), ("conv", (8, 24, (3,))), ("mix", (6, 8, ()))
    ]  # fmt: skip
    before = model(ids)
    for layer in az.adapted_layers(model).values():
        perturbed(layer)
    after = model(ids)
    assert not torch.allclose(before, after)
    az.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), after, atol=1e-5, rtol=1e-5)
    az.unload(model, merge=True)
    assert type(model.mix) is Conv1D
    with torch.no_grad():
        torch.testing.assert_close(model(ids), after, atol=1e-5, rtol=1e-5)


def test_an_attention_of_torch_says_what_to_do():
    for target, words in (("attend", "put an attention in its place that calls nn.Linear"), ("out_proj", "reads its")):
        with pytest.raises(TargetError, match=words):
            az.adapt(Net(), LoRA(r=2), targets=[target])


def test_adalora_trains_and_compacts_on_every_kind():
    model, ids = Net(), torch.arange(11)[None]
    az.adapt(model, MAP(AdaLoRA(r=4, target_r=2)), targets=["embed", "conv", "mix"])
    optimizer = torch.optim.AdamW(az.param_groups(model, lr=1e-2))
    attachment = az.attach(model, optimizer, total_steps=8)
    for _ in range(8):
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()
    assert attachment.finished
    with torch.no_grad():
        before = model.eval()(ids)
        az.compact(model)
        assert sum(az.ranks(model).values()) == 6
        torch.testing.assert_close(model(ids), before, atol=1e-5, rtol=1e-5)


def test_the_error_of_a_merge_is_reported_for_narrow_weights_only():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)).to(torch.bfloat16)
    az.adapt(model, LoRA(r=4, alpha=8))
    layer = model[0]
    with torch.no_grad():
        layer.adapter.B.normal_(std=1e-3)
    exact = layer.factored_weight().dense().detach().double()
    lost = (exact.to(torch.bfloat16).double() - exact).norm() / (exact - layer.weight.detach().double()).norm()
    report = az.merge(model)
    assert report.lost["0"] == pytest.approx(float(lost), rel=1e-4)
    assert report.lost["1"] == 0
    assert report.worst == report.lost["0"] > 0.01
    assert f"0: {report.worst:.2%}" in str(report)
    wide = nn.Sequential(nn.Linear(64, 32))
    az.adapt(wide, LoRA(r=4))
    perturbed(wide[0])
    assert str(az.merge(wide)) == "1 layer merged, nothing lost to rounding"
