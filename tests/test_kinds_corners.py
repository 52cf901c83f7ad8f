"""Corners of convolutions, transposed layers and embeddings: ways of computing, roundings, what is refused."""

import copy
import pickle
from typing import ClassVar

import pytest
import torch
from reference import adapted, tree_of
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import adapterzoo as az
from adapterzoo import MAP, SORA, AdaLoRA, AdaptedLinear, DoRA, FLoRA, Full, LoRA, PreDiag
from adapterzoo.base import DenseBase
from adapterzoo.errors import InputError, PieceError, UnsupportedLayerError
from adapterzoo.factored import FactoredWeight
from adapterzoo.kept import NormCache
from adapterzoo.merging import MergeReport
from adapterzoo.pieces import Generator, Role

KINDS = {
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), lambda: torch.randn(2, 4, 5, 4)),
    "circular": (lambda: nn.Conv1d(3, 5, 3, padding=2, padding_mode="circular"), lambda: torch.randn(2, 3, 6)),
    "transposed": (lambda: Conv1D(6, 4), lambda: torch.randn(2, 3, 4)),
    "embedding": (lambda: nn.Embedding(7, 5), lambda: torch.randint(7, (2, 4))),
}
SPECS = [MAP(DoRA(LoRA(r=2, alpha=3)), per="channel"), SORA(PreDiag(FLoRA(r=2)), rank=2), MAP(Full())]


def moved(layer, size=0.3):
    """The layer with every trainable number of its adapter away from its start."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.adapter.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.add_((size * noise).to(parameter.dtype))
    return layer


def made(kind, spec, dtype=torch.float64):
    torch.manual_seed(3)
    make, draw = KINDS[kind]
    base = make()
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = draw()
    return moved(AdaptedLinear(base.to(dtype), spec)), x if kind == "embedding" else x.to(dtype)


def dense_of(layer):
    """W' by the independent reference, in the weight's layout and float64."""
    weight = layer.weight.detach().double()
    matrix = weight.flatten(1) if layer.kind == "convolution" else weight if layer.kind == "linear" else weight.mT
    whole = matrix + adapted(matrix, tree_of(layer.adapter)[0]).update.detach()
    return whole.reshape(weight.shape) if layer.kind in ("convolution", "linear") else whole.mT


def by_dense(layer, x):
    """The plain layer's forward on W', in float64."""
    plain = copy.deepcopy(layer.base).double()
    return functional_call(plain, {"weight": dense_of(layer)}, (x if x.dtype == torch.int64 else x.double(),))


every_kind = pytest.mark.parametrize("kind", KINDS)
every_spec = pytest.mark.parametrize("spec", SPECS, ids=repr)


class TestHowAConvolutionIsApplied:
    @pytest.mark.parametrize("groups", [2, 3])
    @pytest.mark.parametrize("spec", [LoRA(r=2), AdaLoRA(r=3), SORA(DoRA(LoRA(r=2)), rank=1)], ids=repr)
    @pytest.mark.parametrize("lead", [(2,), ()])
    def test_pairs_of_several_ranks_go_group_by_group(self, groups, spec, lead):
        """Wide enough that two steps cost less than the kernel, so that it is these which are compared."""
        torch.manual_seed(0)
        base = nn.Conv2d(8 * groups, 12 * groups, 3, groups=groups, dtype=torch.float64)
        layer, shapes = moved(AdaptedLinear(base, spec)), []
        original = layer.form._convolve
        layer.form._convolve = lambda x, kernel, parts: shapes.append(kernel.shape[1]) or original(x, kernel, parts)
        x = torch.randn(*lead, 8 * groups, 5, 5, dtype=torch.float64)
        y = layer(x)
        assert shapes == [layer.factored_weight().U.shape[1]]
        torch.testing.assert_close(y, by_dense(layer, x), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize(
        ("base", "spec", "products"),
        [
            ((2, 8, 1), LoRA(r=1), 2 + 8),  # two steps
            ((2, 8, 1), LoRA(r=2), 2 * 8),  # the second step alone costs as much as the kernel
            ((16, 16, 3), FLoRA(r=(16, 1)), 16 + 16 * 9 + 16 * 16),  # three steps; two would cost more than the kernel
            ((32, 32, 3), SORA(LoRA(r=2), rank=1), 4 * (288 + 32)),  # all rows of V at once where none is dropped
        ],
    )
    def test_the_update_costs_the_least_of_its_ways(self, base, spec, products):
        inside, outside, size = base
        layer = moved(AdaptedLinear(nn.Conv2d(inside, outside, size, padding="same"), spec))
        with torch.no_grad():
            weight = layer.factored_weight()
            counted = FlopCounterMode(display=False)
            with counted:
                layer.form.adapted(torch.randn(1, inside, 8, 8), layer.weight, weight, layer.bias, 0.0, False)
        kernel = inside * outside * size**2
        forming = 2 * kernel * weight.U.shape[1] if products == kernel else 0
        assert counted.get_total_flops() == 2 * 64 * (kernel + products) + forming

    def test_rows_that_wrappers_derive_are_a_step_of_their_own_only_beside_others(self):
        layer = moved(AdaptedLinear(nn.Conv2d(32, 32, 3), SORA(FLoRA(r=(2, 2)), rank=1)))
        weight, x = layer.factored_weight(), torch.randn(1, 32, 5, 5)
        assert [len(term.V) for term in layer.form._terms(x, weight, 0.0)] == [2, 2]
        plain = moved(AdaptedLinear(nn.Conv2d(32, 32, 3), SORA(LoRA(r=2), rank=1)))
        assert [len(term.V) for term in plain.form._terms(x, plain.factored_weight(), 0.0)] == [4]
        assert [len(term.V) for term in plain.form._terms(x, plain.factored_weight(), 0.5)] == [2, 2]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_kernel_that_is_formed_is_rounded_once(self, dtype):
        layer = AdaptedLinear(nn.Conv1d(1, 1, 1, bias=False, dtype=dtype), LoRA(r=1, alpha=1))
        with torch.no_grad():
            layer.weight.zero_()
            layer.adapter.B.fill_(1 + 0.4 * torch.finfo(dtype).eps)  # 1 in 16 bits
            layer.adapter.A.fill_(1.5 / (1 + 0.4 * torch.finfo(dtype).eps))  # and less than 1.5
            assert float(layer(torch.ones(1, 1, 1, dtype=dtype))) == 1.5


class TestRoundingInSixteenBits:
    """Errors are measured in those of one rounding of the exact result."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        ("kind", "bias", "roundings"), [("convolution", 0, 1.6), ("convolution", 4, 1.35), ("embedding", 0, 1.001)]
    )
    def test_gains_near_one_and_large_biases_keep_their_digits(self, kind, bias, roundings, dtype):
        torch.manual_seed(0)
        base = nn.Conv1d(64, 96, 1) if kind == "convolution" else nn.Embedding(500, 96)
        x = torch.randn(40, 64, 5, dtype=dtype) if kind == "convolution" else torch.arange(500)
        if kind == "convolution":
            nn.init.normal_(base.bias, std=bias)
        layer = AdaptedLinear(base.to(dtype), PreDiag(LoRA(r=4)))
        with torch.no_grad():
            layer.adapter.diag.add_(0.45 * torch.finfo(dtype).eps)
            layer.adapter.inner.B.normal_(std=0.02)
            y, true = layer(x).double(), by_dense(layer, x)
        one = (true.to(dtype).double() - true).norm()
        assert y.shape == true.shape
        assert float((y - true).norm() / one) < roundings

    @every_kind
    @every_spec
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_layers_train_in_float32(self, kind, spec, dtype):
        layer, x = made(kind, spec, dtype)
        y, true = layer(x), by_dense(layer, x).detach()
        assert y.dtype == dtype
        assert float((y.detach().double() - true).norm() / true.norm()) < 8 * torch.finfo(dtype).eps
        y.float().square().sum().backward()
        for parameter in layer.adapter.parameters():
            assert parameter.dtype == torch.float32
            assert parameter.grad.isfinite().all()
            assert parameter.grad.any()

    @every_kind
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_weights_are_in_the_layers_dtype_and_a_small_update_keeps_its_digits(self, kind, dtype):
        layer, _ = made(kind, LoRA(r=2), dtype)
        with torch.no_grad():
            layer.adapter.B.mul_(1e-6)
            update = (layer.adapter.B @ layer.adapter.A).double()
            stored = layer.form.stored(update)
            assert layer.effective_weight().dtype == layer.delta_weight().dtype == dtype
            assert float((layer.delta_weight().double() - stored).norm() / stored.norm()) < torch.finfo(dtype).eps
            rounded = (layer.weight.double() + stored).to(dtype)
            torch.testing.assert_close(layer.effective_weight(), rounded, rtol=torch.finfo(dtype).eps, atol=0)


class Subclass(Conv1D):
    pass


class OwnForward:
    def forward(self, x):
        return super().forward(x) * 2


class OwnConv(OwnForward, nn.Conv2d):
    pass


class OwnEmbedding(OwnForward, nn.Embedding):
    pass


class OwnTransposed(OwnForward, Conv1D):
    pass


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Parameter(nn.Parameter):
    pass


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        "module",
        [OwnConv(4, 6, 3), OwnEmbedding(5, 3), OwnTransposed(6, 4), Standardised(4, 6, 3)],
        ids=lambda m: type(m).__name__,
    )
    def test_a_forward_of_its_own(self, module):
        with pytest.raises(UnsupportedLayerError, match="it has a forward of its own, which an adapter would bypass"):
            AdaptedLinear(module, LoRA(r=2))

    @pytest.mark.parametrize("make", [lambda: nn.Conv2d(4, 6, 3), lambda: nn.Embedding(5, 3), lambda: Conv1D(6, 4)])
    def test_a_weight_that_is_no_ordinary_parameter(self, make):
        module = make()
        module.weight = Parameter(module.weight.detach())
        with pytest.raises(UnsupportedLayerError, match=r"its weight is a Parameter of torch.float32, not an ordinary"):
            AdaptedLinear(module, LoRA(r=2))
        module = make()
        module.weight = nn.Parameter(module.weight.detach().to(torch.complex64))
        with pytest.raises(UnsupportedLayerError, match=r"its weight is a Parameter of torch.complex64"):
            AdaptedLinear(module, LoRA(r=2))
        del module.weight
        module.weight = torch.ones(4, 6)
        with pytest.raises(UnsupportedLayerError, match=r"its weight is no parameter"):
            AdaptedLinear(module, LoRA(r=2))

    def test_a_subclass_that_keeps_the_forward_is_taken(self):
        layer = AdaptedLinear(Subclass(6, 4), LoRA(r=2))
        assert (layer.kind, layer.shape) == ("transposed", (6, 4, ()))
        assert type(az.unload(layer, merge=True)) is Subclass

    def test_nested_batches_are_refused_by_convolutions(self):
        layer = AdaptedLinear(nn.Conv1d(4, 6, 3), LoRA(r=2), name="stem")
        ragged = torch.nested.nested_tensor([torch.randn(5, 4), torch.randn(7, 4)], layout=torch.jagged)
        for x in (ragged, ragged.transpose(1, 2)):
            with pytest.raises(InputError, match=r"layer 'stem' takes inputs \[batch, 4, W\]; got (\[2, |a nested)"):
                layer(x)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_nested_batches_of_indices_are_taken_apart(self):
        layer = moved(AdaptedLinear(nn.Embedding(9, 3), DoRA(LoRA(r=2))))
        parts = [torch.arange(3), torch.arange(5)]
        for layout in (torch.strided, torch.jagged):
            y = layer(torch.nested.nested_tensor(parts, layout=layout))
            assert all(torch.equal(mine, layer(part)) for mine, part in zip(y.unbind(), parts, strict=True))


class TestEmbeddings:
    def test_both_kinds_of_indices_give_the_same(self):
        layer, x = made("embedding", SPECS[0])
        assert torch.equal(layer(x.int()), layer(x))

    @pytest.mark.parametrize("state", ["adapted", "disabled", "merged"])
    @pytest.mark.filterwarnings("ignore:the base weight of this layer trains")
    def test_padding_trains_nothing_of_a_thawed_weight_either(self, state):
        layer = moved(AdaptedLinear(nn.Embedding(6, 4, padding_idx=2), MAP(LoRA(r=2))))
        layer.adapter.requires_grad_(state == "adapted")
        layer.weight.requires_grad_(True)
        if state == "merged":
            layer.merge()
        layer.disabled = state == "disabled"
        layer(torch.tensor([2, 2])).sum().backward()
        assert not layer.weight.grad.any()
        layer(torch.tensor([2, 3])).sum().backward()
        assert layer.weight.grad[3].all()

    def test_autocast_leaves_it_as_wide_as_the_plain_layer_does(self):
        layer, x = made("embedding", SPECS[1], torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        torch.testing.assert_close(y, layer(x), rtol=0, atol=0)
        assert y.dtype == torch.float32


class TestTransformsAndCopies:
    @every_kind
    @every_spec
    def test_gradients_of_every_sample_sum_up_to_that_of_the_batch(self, kind, spec):
        layer, x = made(kind, spec)
        own = {name: p.detach() for name, p in layer.named_parameters() if name.startswith("adapter")}

        def loss(values, sample):
            return functional_call(layer, values, (sample,)).square().sum()

        layer(x).square().sum().backward()
        for name, each in vmap(grad(loss), (None, 0))(own, x).items():
            torch.testing.assert_close(each.sum(0), layer.get_parameter(name).grad)

    @every_kind
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in its own code
    @pytest.mark.parametrize("spec", [DoRA(LoRA(r=2), detach_norm=False), SPECS[1]], ids=repr)
    def test_forward_mode_agrees_with_differences(self, kind, spec):
        layer, x = made(kind, spec)
        own = {name: p.detach() for name, p in layer.named_parameters() if name.startswith("adapter")}
        torch.manual_seed(5)
        step = {name: torch.randn_like(value) for name, value in own.items()}

        def out(values):
            return functional_call(layer, values, (x,))

        _, tangent = jvp(out, (own,), (step,))
        ahead, behind = ({name: own[name] + sign * 1e-5 * step[name] for name in own} for sign in (1, -1))
        torch.testing.assert_close(tangent, (out(ahead) - out(behind)) / 2e-5, rtol=1e-5, atol=1e-5)

    @every_kind
    def test_an_ensemble_runs_as_one(self, kind):
        members = [made(kind, SPECS[0])[0] for _ in range(2)]
        moved(members[1], size=0.6)
        x = made(kind, SPECS[0])[1]
        together = vmap(lambda *values: functional_call(members[0], values, (x,)))(*stack_module_state(members))
        for mine, member in zip(together, members, strict=True):
            torch.testing.assert_close(mine, member(x))

    @pytest.mark.parametrize(
        ("make", "x"),
        [
            (lambda: nn.Conv1d(2, 4, 2, groups=2, padding=1, padding_mode="circular"), torch.randn(1, 2, 3)),
            (lambda: nn.Embedding(3, 2), torch.tensor([0, 2])),
        ],
        ids=["convolution", "embedding"],
    )
    def test_second_derivatives_are_right(self, make, x):
        torch.manual_seed(0)
        layer = moved(AdaptedLinear(make().double(), SORA(MAP(FLoRA(r=1), per="channel"), rank=1)))
        own = {name: p.detach().requires_grad_() for name, p in layer.named_parameters() if name.startswith("adapter")}
        x = x if x.dtype == torch.int64 else x.double()

        def out(*values):
            return functional_call(layer, dict(zip(own, values, strict=True)), (x,))

        assert torch.autograd.gradgradcheck(out, tuple(own.values()))

    @every_kind
    @pytest.mark.parametrize("merged", [False, True])
    def test_copies_and_pickles_are_whole_and_apart(self, kind, merged):
        layer, x = made(kind, SPECS[0])
        if merged:
            layer.merge()
        with torch.no_grad():
            before = layer(x)
            for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert other.form.module is other.base
                assert other.base._parameters is other._parameters
                assert torch.equal(other(x), before)
                if merged:
                    other.unmerge()
                other.weight.mul_(2)
                torch.testing.assert_close(other(x), by_dense(other, x))
                assert torch.equal(layer(x), before)

    @every_kind
    @pytest.mark.filterwarnings("ignore:the base weight of this layer trains")
    def test_a_thawed_base_has_the_gradient_of_the_dense_form(self, kind):
        layer, x = made(kind, SORA(DoRA(LoRA(r=2), detach_norm=False), rank=1))
        layer.weight.requires_grad_(True)
        y = layer(x)
        weights = torch.randn_like(y)
        (y * weights).sum().backward()
        leaf = layer.weight.detach().clone().requires_grad_()
        matrix = leaf.flatten(1) if layer.kind == "convolution" else leaf.mT
        whole = matrix + adapted(matrix, tree_of(layer.adapter)[0]).update
        stored = whole.reshape(leaf.shape) if layer.kind == "convolution" else whole.mT
        (functional_call(copy.deepcopy(layer.base), {"weight": stored}, (x,)) * weights).sum().backward()
        torch.testing.assert_close(layer.weight.grad, leaf.grad)

    @every_kind
    def test_no_inputs_at_all_are_fine(self, kind):
        layer, x = made(kind, SORA(DoRA(LoRA(r=2, dropout=0.5)), rank=1))
        y = layer.train()(x[:0])
        assert y.shape == (0, *layer.base(x).shape[1:])
        y.sum().backward()
        assert not any(p.grad.any() for p in layer.adapter.parameters())

    @every_kind
    def test_from_the_meta_device(self, kind):
        source, x = made(kind, SPECS[0], torch.float32)
        with torch.device("meta"):
            model = nn.Sequential(KINDS[kind][0]())
        az.adapt(model, SPECS[0], targets=["0"])
        base = {f"0.{name}": value for name, value in source.base.state_dict().items()}
        model.to_empty(device="cpu").load_state_dict(base, strict=False)
        az.reset_adapters(model)
        torch.testing.assert_close(model(x), source.base(x))
        model.load_state_dict({f"0.{name}": value for name, value in source.state_dict().items()}, assign=True)
        assert torch.equal(model(x), source(x))


def test_channels_last_models_compute_and_keep_their_format():
    layer = moved(AdaptedLinear(nn.Conv2d(4, 6, 3, groups=2), MAP(DoRA(FLoRA(r=2)))))
    x = torch.randn(2, 4, 5, 5)
    before = layer(x)
    y = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, before)
    other = AdaptedLinear(nn.Conv2d(4, 6, 3, groups=2), MAP(DoRA(FLoRA(r=2))))
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), before)


class TestWholeModels:
    def test_a_layer_by_itself_is_no_model(self):
        for layer in (nn.Conv2d(4, 6, 3), nn.Embedding(5, 3), Conv1D(6, 4)):
            with pytest.raises(UnsupportedLayerError, match="it is the model itself"):
                az.adapt(layer, LoRA(r=2))

    def test_plans_speak_of_linear_layers_alone(self):
        model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(6, 3), nn.Embedding(5, 3), nn.Linear(3, 3))
        first = az.adapt(model, targets={"0": LoRA(r=2), "2": None}, exclude=["3"])
        assert [item.names[0] for item in first.adapted] == ["0"]
        assert [(item.name, item.reason) for item in first.left_alone] == [("3", "excluded"), ("1", "not targeted")]
        second = az.adapt(model, LoRA(r=2), exclude=["3"])
        assert [item.names[0] for item in second.adapted] == ["1"]
        assert [item.name for item in second.left_alone] == ["3"]

    def test_a_merge_says_the_worst_first_and_only_what_was_lost(self):
        text = str(MergeReport({"a": 0.1, "b": 0.0, "c": 0.3}))
        assert text.startswith("3 layers merged; share of the update lost")
        assert text.index("c: 30.00%") < text.index("a: 10.00%")
        assert "b:" not in text
        assert MergeReport({}).worst == 0


class TestStarts:
    def test_the_rank_of_a_tucker_update_is_the_smaller_one(self):
        for r in ((2, 4), (4, 2)):
            assert AdaptedLinear(nn.Linear(8, 9), FLoRA(r=r)).factored_weight().U.shape == (9, 2)

    def test_every_mode_of_a_kernel_has_a_factor_of_its_own(self):
        spec = FLoRA(r=(2, 2, 3, 3))
        bare, wrapped = (AdaptedLinear(nn.Conv2d(4, 4, 3), own).adapter.generator for own in (spec, MAP(spec)))
        assert not torch.equal(bare.K1, bare.K2)
        assert torch.equal(bare.K1, wrapped.K1)
        assert torch.equal(bare.K2, wrapped.K2)

    def test_factors_of_modes_are_as_long_as_their_rank_says(self):
        adapter = AdaptedLinear(nn.Conv1d(60, 80, 101), FLoRA(r=(40, 20, 50))).adapter
        for value, rank in ((adapter.A, 40), (adapter.B, 20), (adapter.K1, 50)):
            assert float(value.detach().std()) == pytest.approx((0.5 / rank) ** 0.5, rel=0.06)

    @pytest.mark.parametrize("floor", [0.25, "literal"])
    def test_map_per_channel_leaves_a_filter_of_zeros_to_its_update(self, floor):
        base = nn.Conv1d(3, 4, 2, dtype=torch.float64)
        with torch.no_grad():
            base.weight[1].zero_()
        layer = AdaptedLinear(base, MAP(LoRA(r=2), per="channel", floor=floor))
        assert float(layer.adapter.alpha[1].detach()) == 0
        assert torch.equal(layer.effective_weight(), base.weight)
        with torch.no_grad():
            layer.adapter.inner.B[:2] = 0.01  # below a floor of 0.25, which is 0.25 itself where a filter is zero
            layer.adapter.alpha.add_(0.5)
            layer.adapter.beta.fill_(2)
            update = (layer.adapter.inner.B[1] @ layer.adapter.inner.A).reshape(3, 2)
            length = update.norm() if floor == "literal" else 0.25
            torch.testing.assert_close(layer.effective_weight()[1], 2 * update / length)
        layer(torch.randn(2, 3, 5, dtype=torch.float64)).sum().backward()
        assert float(layer.adapter.alpha.grad[1]) == 0
        assert all(p.grad.isfinite().all() for p in layer.adapter.parameters())

    @pytest.mark.parametrize("per", ["matrix", "channel"])
    def test_map_over_a_weight_at_the_end_of_its_dtype_starts_finite(self, per):
        base = nn.Conv1d(3, 4, 2, bias=False)
        nn.init.constant_(base.weight, 1e-44)  # a hundredth of its norm is no number of float32
        layer, x = AdaptedLinear(base, MAP(LoRA(r=2), per=per)), torch.randn(2, 3, 5)
        assert torch.equal(layer.effective_weight(), base.weight)
        torch.testing.assert_close(layer(x), base(x), rtol=0, atol=1e-42)


class Net(nn.Module):
    """It reads of its layers what models read of them."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(9, 4, padding_idx=1), nn.Conv2d(4, 6, 3, stride=2)
        self.depth = nn.Conv2d(6, 6, 3, groups=6, padding=1, padding_mode="circular")
        self.mix = Conv1D(5, 6)

    def forward(self, ids):
        x = self.embed(ids.to(self.embed.weight.device)).movedim(-1, 1).to(self.conv.weight.dtype)
        x = self.mix(self.depth(self.conv(x)).movedim(1, -1).contiguous())
        return x * self.conv.stride[0] + self.embed.num_embeddings


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own code makes them
def test_models_of_every_kind_compile_in_one_graph():
    torch.manual_seed(0)
    model, ids = Net(), torch.randint(9, (2, 9, 9))
    nn.init.normal_(model.mix.weight)
    az.adapt(model, SORA(DoRA(LoRA(r=2)), rank=1), targets=["embed", "conv", "depth", "mix"])
    for layer in az.adapted_layers(model).values():
        moved(layer)
    model(ids).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(ids)
    torch.testing.assert_close(y, model(ids))
    y.square().sum().backward()
    for name, value in plain.items():
        torch.testing.assert_close(model.get_parameter(name).grad, value, rtol=1e-3, atol=1e-3 * float(value.norm()))


def test_names_that_no_layer_has_are_errors_of_the_adapted_layer_and_private_ones_stay_private():
    layer = AdaptedLinear(nn.Conv2d(4, 6, 3), LoRA(r=2))
    with pytest.raises(AttributeError, match="'AdaptedLinear' object has no attribute 'strides'"):
        _ = layer.strides
    assert not hasattr(layer, "_conv_forward")
    assert not hasattr(layer, "__torch_function__")


def test_row_norms_of_an_update_without_factors_are_those_of_its_gains():
    weight = torch.randn(3, 4, dtype=torch.float64)
    base, delta = DenseBase(weight, NormCache()), torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)
    rows = weight.norm(dim=1)
    torch.testing.assert_close(FactoredWeight(base, delta=delta).update_row_norms(), delta.abs() * rows)
    torch.testing.assert_close(FactoredWeight(base, delta=delta[1:2]).update_row_norms(), 2 * rows)
    assert not FactoredWeight(base).update_row_norms().any()


class Rank(Generator):
    roles: ClassVar = {"A": Role.INPUT_FACTOR, "B": Role.OUTPUT_FACTOR, "C": Role.CORE}
    optional: ClassVar = frozenset({"C"})
    leaves_out: str

    def init(self, site):
        whole = {"A": site.ones(1, site.in_features), "B": site.zeros(site.out_features, 1), "C": site.ones(1)}
        return {name: value for name, value in whole.items() if name not in self.leaves_out}

    def update(self, params, site):
        return site.low_rank(params.B if "C" in self.leaves_out else params.B * params.C, params.A)


def test_only_optional_parameters_may_be_left_out():
    layers = {out: AdaptedLinear(nn.Conv1d(3, 4, 2), Rank(leaves_out=out)) for out in ("", "C")}
    assert [list(layer.adapter.roles) for layer in layers.values()] == [["A", "B", "C"], ["A", "B"]]
    for layer in layers.values():
        layer.reset(seed=1)
        copy.deepcopy(layer).load_state_dict(layer.state_dict())
    told = r"Rank \(of test_kinds_corners\).init made \['A', 'C'\], but its `roles` declare \['A', 'B', 'C'\]"
    with pytest.raises(PieceError, match=told):
        AdaptedLinear(nn.Conv1d(3, 4, 2), Rank(leaves_out="B"))


def test_a_bias_is_added_once_whatever_the_gain():
    base = nn.Conv1d(3, 4, 2)
    layer = AdaptedLinear(base, PreDiag(LoRA(r=2)))
    with torch.no_grad():
        layer.adapter.diag.fill_(5.0)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(layer(x), 5 * F.conv1d(x, base.weight) + base.bias[:, None])


class Twice(nn.Module):
    def forward(self, value):
        return 2 * value


def plain_tensor(layer, name):
    value = getattr(layer, name).detach().clone()
    delattr(layer, name)
    setattr(layer, name, value)


@pytest.mark.parametrize("spec", [LoRA(r=2), DoRA(LoRA(r=2))], ids=repr)
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: parametrize.register_parametrization(layer, "bias", Twice()),
        lambda layer: prune.identity(layer, "bias"),
        lambda layer: plain_tensor(layer, "bias"),
    ],
    ids=["parametrised", "pruned", "plain tensor"],
)
@pytest.mark.parametrize("off", [False, True])
def test_a_bias_that_is_no_parameter_any_more_is_still_added(spec, change, off):
    layer, x = AdaptedLinear(nn.Linear(4, 6), spec), torch.randn(3, 4)
    change(layer)
    layer.disabled = off
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("spec", [LoRA(r=2), DoRA(LoRA(r=2))], ids=repr)
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: parametrize.register_parametrization(layer, "weight", Twice()),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        lambda layer: plain_tensor(layer, "weight"),
    ],
    ids=["parametrised", "pruned", "plain tensor"],
)
def test_a_weight_that_was_pruned_or_parametrised_afterwards_is_the_one_that_is_applied(spec, change):
    layer, x = AdaptedLinear(nn.Linear(4, 6), spec), torch.randn(3, 4)
    change(layer)
    weight = layer.weight
    rows = weight.norm(dim=1, keepdim=True)
    gain = 1 if isinstance(spec, LoRA) else layer.adapter.magnitude[:, None] / rows
    torch.testing.assert_close(layer(x), F.linear(x, gain * weight, layer.bias))
    assert (layer.shape, layer.in_features) == ((6, 4, ()), 4)


@pytest.mark.parametrize(("name", "value"), [("stride", (2, 2)), ("padding_mode", "circular"), ("dilation", (2, 2))])
def test_options_that_are_set_are_applied_or_refused(name, value):
    layer, plain = AdaptedLinear(nn.Conv2d(4, 6, 3, padding=1), LoRA(r=2)), nn.Conv2d(4, 6, 3, padding=1)
    try:
        setattr(layer, name, value)
    except AttributeError:
        return
    assert getattr(layer.base, name) == getattr(layer, name)
    setattr(plain, name, value)
    x = torch.randn(1, 4, 8, 8)
    assert layer(x).shape == plain(x).shape
    assert getattr(az.unload(layer, merge=False), name) == value


class Copies(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.clone.default, torch.ops.aten._unsafe_view.default):
            self.largest = max(self.largest, out.numel())
        return out


def test_a_channels_last_kernel_is_not_copied_in_every_forward():
    layer = AdaptedLinear(nn.Conv2d(64, 64, 3), LoRA(r=2)).to(memory_format=torch.channels_last)
    x = torch.randn(1, 64, 4, 4).to(memory_format=torch.channels_last)
    with Copies() as seen:
        layer(x)
    assert seen.largest < layer.weight.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [SORA(FLoRA(r=8), rank=4)], ids=repr)
def test_a_convolution_rounds_as_often_as_a_linear_layer(spec, dtype):
    torch.manual_seed(0)
    line, conv = nn.Linear(64, 64).to(dtype), nn.Conv2d(64, 64, 1).to(dtype)
    conv.load_state_dict({"weight": line.weight.detach()[..., None, None], "bias": line.bias.detach()})
    line, conv = AdaptedLinear(line, spec), AdaptedLinear(conv, spec)
    with torch.no_grad():
        for parameter in line.adapter.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        own = conv.state_dict()
        conv.load_state_dict({name: value.reshape(own[name].shape) for name, value in line.state_dict().items()})
        x = torch.randn(512, 64).to(dtype)
        true = F.linear(x.double(), line.factored_weight().dense().double(), line.bias.double())
        errors = [(y.double() - true).norm() for y in (line(x), conv(x[..., None, None])[..., 0, 0])]
    assert errors[1] < 1.1 * errors[0]  # 1.26 now


def test_a_kernel_that_is_formed_under_autocast_is_formed_in_float32():
    eps = torch.finfo(torch.bfloat16).eps
    layer = AdaptedLinear(nn.Conv1d(1, 1, 1, bias=False), LoRA(r=1, alpha=1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer.weight.zero_()
        layer.adapter.B.fill_(1 + 0.4 * eps)
        layer.adapter.A.fill_(1.5 / (1 + 0.4 * eps))
        assert float(layer(torch.ones(1, 1, 1))) == 1.5


@pytest.mark.filterwarnings("ignore")
def test_a_strided_nested_batch_is_refused_by_name():
    layer = AdaptedLinear(nn.Conv1d(4, 6, 3), LoRA(r=2), name="stem")
    with pytest.raises(InputError, match="stem"):
        layer(torch.nested.nested_tensor([torch.randn(4, 5), torch.randn(4, 7)]))


def test_the_repr_of_a_transposed_layer_says_its_sizes():
    text = repr(AdaptedLinear(Conv1D(6, 4), LoRA(r=2)))
    assert "\n  , spec" not in text


def test_methods_of_the_base_that_would_overwrite_it_are_none_of_the_layers():
    layer = AdaptedLinear(nn.Conv2d(4, 6, 3), LoRA(r=2))
    assert not hasattr(layer, "reset_parameters")
    assert layer.padding_mode == "zeros"
