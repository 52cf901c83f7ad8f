"""Quantised bases: what their four calls compute, and adapters on them, against W read from the codes in float64."""

import copy
import logging
import sys

import bitsandbytes as bnb
import pytest
import torch
import transformers as tf
from reference import RULES, adapted, tree_of
from torch import nn
from torch.nn import functional as F
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerTensor,
    quantize_,
)

from adapterzoo import (
    MAP,
    SORA,
    AdaLoRA,
    AdaptedLinear,
    DoRA,
    FLoRA,
    Full,
    LoRA,
    PreDiag,
    adapt,
    disabled,
    merge,
    reset_adapters,
    unload,
    unmerge,
)
from adapterzoo.checkpoint.loading import load
from adapterzoo.checkpoint.saving import save
from adapterzoo.errors import InputError, MergedError, TargetError, UnsupportedLayerError
from adapterzoo.factored import FactoredWeight, RightFactor
from adapterzoo.kept import NormCache
from adapterzoo.layer import adapted_layers
from adapterzoo.pieces import Wrapper, layers_of
from adapterzoo.quantised import base as quantised_base
from adapterzoo.quantised import find
from adapterzoo.registry import pieces
from adapterzoo.testing.truth import dense_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of a product, relative
INT8 = 2e-2  # of a product whose inputs are rounded to 8 bits


@pytest.fixture(autouse=True)
def _no_chatter():
    """bitsandbytes logs a line for every layer that rounds float32 inputs."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def four_bit(linear, kind="nf4", double=False, **options):
    options = {"quant_type": kind, "compress_statistics": double, **options}
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, **options)
    return _filled(layer, linear)


def eight_bit(linear, threshold=6.0):
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=threshold
    )
    return _filled(layer, linear)


def _filled(layer, linear):
    layer = layer.to(linear.weight.dtype)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu").train(linear.training)  # the library quantises here


def torchao(linear, **options):
    holder = nn.Sequential(linear)
    quantize_(holder, Int8WeightOnlyConfig(**options))
    return holder[0]


KINDS = {
    "nf4": four_bit,
    "nf4, double": lambda linear: four_bit(linear, double=True),
    "fp4": lambda linear: four_bit(linear, "fp4"),
    "fp4, double": lambda linear: four_bit(linear, "fp4", double=True),
    "8-bit": eight_bit,
    "8-bit, no outliers": lambda linear: eight_bit(linear, threshold=0.0),
    "torchao": torchao,
    "torchao, groups": lambda linear: torchao(linear, granularity=PerGroup(32)),
    "torchao, one scale": lambda linear: torchao(linear, granularity=PerTensor()),
}
LIBRARIES = ("nf4, double", "8-bit", "torchao")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_library = pytest.mark.parametrize("kind", LIBRARIES)


def quantised(kind, cols=64, out=48, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return KINDS[kind](nn.Linear(cols, out, bias).to(dtype)).requires_grad_(False)


def numbers(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def codes_of(layer):
    """Copies of all that the weight is stored in."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    scales = [getattr(weight, name, None) for name in ("scale", "SCB")] + [getattr(state, "absmax", None)]
    return [t.detach().clone() for t in (getattr(weight, "qdata", weight.data), *scales) if t is not None]


def unchanged(layer, before):
    """Not a bit of what the weight is stored in has changed."""
    for old, new in zip(before, codes_of(layer), strict=True):
        same(new, old)


def read(layer, weight=None):
    """W in float64 from codes and scales, without the libraries' own dequantisation."""
    weight = layer.weight if weight is None else weight
    if isinstance(weight, bnb.nn.Params4bit):
        return _read_4bit(weight, (layer.out_features, layer.in_features))
    if isinstance(weight, bnb.nn.Int8Params):
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.double() * scales.double()[:, None] / 127
    groups = weight.scale.shape[1]
    scales = weight.scale.double().expand(len(weight), groups).repeat_interleave(weight.shape[1] // groups, dim=1)
    return weight.qdata.double() * scales


def _read_4bit(weight, shape):
    state = weight.quant_state
    scales = state.absmax.double()
    if state.nested:
        blocks = state.state2.absmax.double().repeat_interleave(256)[: len(scales)]
        scales = state.state2.code.double()[state.absmax.long()] * blocks + state.offset.double()
    packed = weight.data.view(torch.uint8).flatten().long()
    values = state.code.double()[torch.stack([packed >> 4, packed & 15], dim=1).flatten()]
    values = values[: shape[0] * shape[1]]
    return (values * scales.repeat_interleave(state.blocksize)[: len(values)]).reshape(shape)


def base_of(layer):
    norms = NormCache()
    norms.bind(layer.weight)
    kind = find(layer)
    assert kind is not None
    assert kind.problem(layer) is None
    return kind(layer, layer.weight, norms)


def assert_close(actual, expected, tolerance):
    error = float((actual.detach().double() - expected.detach().double()).norm())
    assert error <= tolerance * float(expected.detach().double().norm()) + 1e-30, error


def same(actual, expected):
    """Bit for bit, and of the same dtype."""
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=0, atol=0)


def plain_forward(layer, x):
    """As the plain layer; a 4-bit one in training, since its evaluation changes the weight on some processors."""
    other = copy.deepcopy(layer)
    return other.train(other.training or isinstance(other, bnb.nn.Linear4bit))(x)


# The four calls.


@every_kind
def test_a_quantised_weight_is_what_its_codes_and_scales_say(kind):
    layer = quantised(kind, 128, 40)
    base = base_of(layer)
    assert base.shape == (40, 128, ())
    assert base.dense().dtype == torch.float32
    assert_close(base.dense(), read(layer), 2e-7)
    assert base.device == torch.device("cpu")
    if kind.startswith("torchao"):
        same(base.dense(), layer.weight.dequantize(torch.float32))
        same(base.rows(0, 40, torch.bfloat16), layer.weight.dequantize(torch.bfloat16))


@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_inputs_run_through_the_librarys_own_kernel_bit_for_bit(kind, dtype, training):
    layer = quantised(kind, dtype=dtype).train(training)
    x = numbers(2, 5, 64, dtype=dtype)
    x[0, 0, 3] = 9.0  # an outlier, which 8-bit kernels take apart
    before, version, codes = x.clone(), x._version, codes_of(layer)
    kernel = base_of(layer).by_kernel()
    same(kernel.apply(x, layer.bias), plain_forward(layer, x.clone()))
    layer.bias = None
    same(kernel.apply(x), plain_forward(layer, x.clone()))
    assert kernel.apply(x[0, 0]).shape == (48,)
    assert kernel.apply(x[:0]).shape == (0, 5, 48)
    same(x, before)
    assert x._version == version  # some kernels write to their input and put it back
    unchanged(layer, codes)


@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_inputs_are_those_of_the_librarys_own_backward(kind, dtype):
    layer = quantised(kind, dtype=dtype)
    x, y = numbers(2, 5, 64, dtype=dtype).requires_grad_(), numbers(2, 5, 48, seed=2, dtype=dtype)
    (ours,) = torch.autograd.grad(base_of(layer).by_kernel().apply(x, layer.bias), x, y)
    (theirs,) = torch.autograd.grad(plain_forward(layer, x), x, y)
    assert ours.dtype == theirs.dtype
    if kind.startswith("torchao"):  # theirs scales codes after the product, ours before it
        assert_close(ours, theirs, ROUNDING[dtype])
    else:
        same(ours, theirs)
    same(base_of(layer).by_kernel().apply_t(y), ours)


@every_kind
@pytest.mark.parametrize(("cols", "out"), [(128, 40), (64, 1), (100, 33)])
def test_products_by_blocks_are_exact(kind, cols, out, monkeypatch):
    cols = 96 if kind == "torchao, groups" and cols % 32 else cols  # torchao wants whole groups
    monkeypatch.setattr(quantised_base, "_BLOCK", 5 * cols)
    monkeypatch.setattr(quantised_base, "_WHOLE", 7 * cols)
    layer = quantised(kind, cols, out)
    base, W = base_of(layer), read(layer)
    x, y, bias = numbers(3, 2, cols), numbers(2, 3, out), numbers(out)
    assert_close(base.apply(x), x.double() @ W.T, 1e-6)
    assert_close(base.apply(x, bias), x.double() @ W.T + bias, 1e-6)
    assert_close(base.apply_t(y), y.double() @ W, 1e-6)
    assert_close(base.apply_t(y.bfloat16()), y.bfloat16().double() @ W, 2 * ROUNDING[torch.bfloat16])
    assert_close(base.row_norms_sq(), W.square().sum(dim=1), 1e-7)
    assert base.row_norms_sq().dtype == torch.float64


@every_library
def test_blocks_are_summed_in_float32(kind, monkeypatch):
    base = base_of(quantised(kind, 64, 192, dtype=torch.bfloat16))
    y = numbers(8, 192, dtype=torch.bfloat16)
    whole = base.apply_t(y)
    monkeypatch.setattr(quantised_base, "_WHOLE", 64)
    exact = y.double() @ base.dense().double()
    # Every block's product is rounded as the whole is, so errors add up to √2 of one; a sum in 16 bits has seven.
    assert (base.apply_t(y) - exact).norm() < 2 * (whole - exact).norm()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, on the first jvp
@every_library
def test_both_products_are_differentiable_to_any_order(kind):
    layer = quantised(kind, out=6)
    base = base_of(layer)
    x, bias = numbers(2, 64).double().requires_grad_(), numbers(6, seed=3).double().requires_grad_()
    y = numbers(2, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(base.apply, (x, bias))
    assert torch.autograd.gradcheck(base.apply_t, (y,))
    assert torch.autograd.gradgradcheck(lambda x: base.apply(x).square(), (x,))
    assert torch.autograd.gradgradcheck(lambda y: base.apply_t(y).square(), (y,))
    torch.testing.assert_close(torch.func.jvp(base.apply, (x,), (x,))[1], base.apply(x))
    torch.testing.assert_close(torch.func.vmap(base.apply)(x), base.apply(x))


@every_library
def test_row_norms_are_computed_once(kind, monkeypatch):
    layer = AdaptedLinear(quantised(kind), DoRA(LoRA(r=2)))
    calls = []
    compute = quantised_base.QuantisedBase._row_norms_sq
    monkeypatch.setattr(
        quantised_base.QuantisedBase, "_row_norms_sq", lambda self, w: calls.append(1) or compute(self, w)
    )
    layer.refresh()
    for _ in range(3):
        layer(numbers(2, 64)).sum().backward()
    assert len(calls) == 1


@every_library
def test_nothing_is_dequantised_as_a_whole_for_norms_and_factors(kind, monkeypatch):
    monkeypatch.setattr(quantised_base, "_BLOCK", 8 * 64)
    layer = AdaptedLinear(quantised(kind), MAP(DoRA(LoRA(r=2))))
    sizes = []
    rows = type(layer.site().base).rows
    monkeypatch.setattr(
        type(layer.site().base), "rows", lambda self, a, b, dtype: sizes.append(b - a) or rows(self, a, b, dtype)
    )
    with torch.no_grad():
        layer.adapter.inner.inner.B.normal_()
    layer.refresh()
    weight = layer.factored_weight()
    weight.row_norms()
    weight.update_norm()
    assert sizes
    assert max(sizes) <= 8


# Row norms: the bound that the products of factors have to meet.

STRENGTHS = (1e-3, 1e-2, 0.3, 1.0, 30.0)


def norm_error(base, W, strength, dtype=torch.float32):
    """The largest relative error of ‖(W + U V)_i‖ for ‖U V‖ = strength · ‖W‖, and one that takes 0.9 of W away."""
    out, cols = W.shape
    U, V = numbers(out, 8, seed=4).double(), numbers(8, cols, seed=5).double()
    left, right = (strength * W.norm() / (U @ V).norm() * U).to(dtype), V.to(dtype)
    errors = []
    for U, V in [(left, right), ((-0.9 * W[:, : cols // 2]).to(dtype), torch.eye(cols)[: cols // 2].to(dtype))]:
        weight = FactoredWeight(base, U=U, V=RightFactor(base, V))
        expected = (W + U.double() @ V.double()).norm(dim=1)
        errors.append(float(((weight.row_norms().double() - expected).abs() / expected).max()))
    return max(errors)


@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_row_norms_of_adapted_weights_are_good_to_a_ten_thousandth(kind, dtype, training):
    layer = quantised(kind, 256, 96, dtype=dtype).train(training)
    if isinstance(layer, bnb.nn.Linear4bit):
        layer.compute_dtype, layer.compute_type_is_set = torch.bfloat16, True  # its kernel would round V
    W, base = read(layer), base_of(layer)
    for strength in STRENGTHS:
        assert norm_error(base, W, strength) <= 1e-4 / 20, (kind, strength)


@every_library
@pytest.mark.parametrize("elements", [64, 2**20])
def test_column_norms_are_summed_over_blocks_of_rows(kind, elements, monkeypatch):
    monkeypatch.setattr(quantised_base, "_BLOCK", elements)
    layer = quantised(kind)
    squares = read(layer).square().sum(dim=0)
    torch.testing.assert_close(base_of(layer).column_norms_sq(), squares, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["nf4", "8-bit"])
def test_the_librarys_kernels_would_miss_that_bound(kind):
    layer = quantised(kind, 256, 96).eval()
    if isinstance(layer, bnb.nn.Linear4bit):
        layer.compute_dtype, layer.compute_type_is_set = torch.bfloat16, True
    assert norm_error(base_of(layer).by_kernel(), read(layer), 1.0) > 1e-4


# Adapters on quantised layers.

GENERATORS = {
    "LoRA": LoRA(r=3, alpha=5),
    "AdaLoRA": AdaLoRA(r=3, alpha=5),
    "FLoRA": FLoRA(r=3, scale=0.7),
    "Full": Full(),
}
WRAPPERS = {"MAP": MAP, "DoRA": DoRA, "PreDiag": PreDiag, "SORA": lambda inner: SORA(inner, rank=2)}
SPECS = [
    *GENERATORS.values(),
    *(wrap(inner) for wrap in WRAPPERS.values() for inner in GENERATORS.values()),
    MAP(DoRA(SORA(PreDiag(AdaLoRA(r=3)), rank=2))),
    DoRA(LoRA(r=3), detach_norm=False),
]


def small(kind):
    """A piece outside of the reference with a small rank; a wrapper of them around LoRA."""
    rank = {"r": 3} if "r" in kind.model_fields else {}
    return kind(*([GENERATORS["LoRA"]] if issubclass(kind, Wrapper) else []), **rank)


OTHERS = [small(kind) for name, kind in pieces().items() if name not in {*GENERATORS, *WRAPPERS}]


def perturb(layer, strength=0.05):
    with torch.no_grad():
        for seed, parameter in enumerate(layer.adapter.parameters()):
            parameter.add_(strength * numbers(*parameter.shape, seed=10 + seed))
    layer.refresh()


class Truth:
    """The dense reference in float64, over W as it is read from the codes; of the others the pieces' slow truths."""

    def __init__(self, layer):
        tree, self.leaves = tree_of(layer.adapter)
        W = read(layer.base, layer.weight)
        known = all(type(piece).__name__ in RULES for piece in layers_of(layer.spec))
        self.weight = W + adapted(W, tree).update if known else dense_weight(layer, self.leaves, W)
        self.bias = None if layer.bias is None else layer.bias.double()

    def __call__(self, x):
        return F.linear(x.double(), self.weight, self.bias)


@every_library
@pytest.mark.parametrize("spec", SPECS + OTHERS, ids=repr)
def test_forward_and_gradients_agree_with_the_dequantised_dense_form(kind, spec):
    layer = AdaptedLinear(quantised(kind, bias=spec.depth % 2 == 0), spec).train()
    perturb(layer)
    truth = Truth(layer)
    x, weights = numbers(2, 5, 64).requires_grad_(), numbers(2, 5, 48, seed=2)
    exact = x.detach().double().requires_grad_()
    y, expected = layer(x), truth(exact)
    assert_close(y, expected, 2e-6)
    assert_close(layer.effective_weight(), truth.weight, 2e-6)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(x.grad, exact.grad, 5e-6)
    for name, parameter in layer.adapter.named_parameters():
        true = truth.leaves[name].grad
        scale = float(true.norm())
        error = float((parameter.grad.double() - true).norm())
        # A scalar's gradient is a sum of products that cancel: it is measured by its largest terms.
        scale = max(scale, float(exact.grad.norm() * exact.detach().norm()) / 100) if parameter.numel() == 1 else scale
        assert error <= 2e-5 * scale, (name, error, scale)


@every_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_in_16_bits_the_error_is_the_kernels_own(kind, dtype, training):
    layer = AdaptedLinear(quantised(kind, 256, 96, dtype=dtype), MAP(DoRA(LoRA(r=3)))).train(training)
    perturb(layer)
    assert {p.dtype for p in layer.adapter.parameters()} == {torch.float32}
    x = numbers(3, 7, 256, dtype=dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    truth = Truth(layer)
    assert_close(y, truth(x), max(2 * ROUNDING[dtype], INT8 if kind == "8-bit" and not training else 0))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert_close(dx, torch.ones_like(y).double() @ truth.weight, 2 * ROUNDING[dtype])


@every_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spec", [LoRA(r=3), MAP(LoRA(r=3))], ids=repr)
def test_at_the_start_no_bit_of_the_output_changes_at_init(kind, dtype, training, spec):
    plain = quantised(kind, bias=spec.depth == 0, dtype=dtype)  # a gain comes between the product and its bias
    layer = AdaptedLinear(copy.deepcopy(plain), spec).train(training)
    x = numbers(4, 64, dtype=dtype)
    same(layer(x), plain_forward(plain.train(training), x))


def test_an_8_bit_layer_follows_the_mode_of_the_adapted_one():
    """Its kernel rounds inputs in evaluation and not in training, on a processor."""
    layer = AdaptedLinear(quantised("8-bit"), LoRA(r=2))
    x = numbers(4, 64)
    assert not layer.train()(x).equal(layer.eval()(x))
    assert_close(layer(x), layer.train()(x), INT8)


@every_library
def test_autocast_is_that_of_the_plain_layer(kind):
    plain = quantised(kind)
    layer = AdaptedLinear(copy.deepcopy(plain), LoRA(r=3))
    x = numbers(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), plain_forward(plain, x)
    same(y, expected)


@every_library
def test_bad_inputs_are_errors_by_name(kind):
    layer = AdaptedLinear(quantised(kind), LoRA(r=2), name="q")
    with pytest.raises(InputError, match=r"layer 'q' takes inputs \[\.\.\., 64\]; got \[2, 3\]"):
        layer(numbers(2, 3))
    with pytest.raises(InputError, match=r"takes float32, bfloat16 or float16; got torch\.float64"):
        layer(numbers(2, 64).double())


@every_library
def test_disabled_is_the_plain_layer(kind):
    plain = quantised(kind)
    layer = AdaptedLinear(copy.deepcopy(plain), MAP(LoRA(r=3)))
    perturb(layer)
    x = numbers(4, 64)
    with disabled(layer):
        same(layer(x), plain_forward(plain, x))
    assert not layer(x).equal(plain_forward(plain, x))


# Merging.


@every_library
def test_merging_is_refused_and_leaves_all_as_it_was(kind):
    model = nn.Sequential(nn.Linear(64, 64), quantised(kind))
    adapt(model, LoRA(r=2))
    before = codes_of(model[1])
    with pytest.raises(MergedError, match=r"quantised weights, [\s\S]*dequantize=True[\s\S]*- 1 \("):
        merge(model)
    with pytest.raises(MergedError, match="dequantize=True"):
        unload(model, merge=True)
    assert not any(layer.merged for layer in adapted_layers(model).values())
    unchanged(model[1], before)


@every_library
@pytest.mark.parametrize("base_device", [None, "cpu"])
def test_merging_dequantises_on_request_and_unmerging_gives_every_bit_back(kind, base_device):
    layer = AdaptedLinear(quantised(kind), MAP(DoRA(LoRA(r=3)))).eval()
    perturb(layer)
    truth, before, state = Truth(layer), codes_of(layer), layer.state_dict()
    x = numbers(4, 64)
    with torch.no_grad():
        y = layer(x)
        merge(layer, base_device=base_device, dequantize=True)
        assert type(layer.weight) is nn.Parameter
        assert_close(layer.weight, truth.weight, 2e-6)
        assert_close(layer(x), truth(x), 2e-6)
        assert {name: value.dtype for name, value in layer.state_dict().items()} == {
            name: value.dtype for name, value in state.items()
        }
        with disabled(layer):
            assert_close(layer(x), x.double() @ read(layer.base, layer.unmerged_weight).T + layer.bias, INT8)
        unmerge(layer)
        unchanged(layer, before)
        same(layer(x), y)


@every_library
def test_unload_gives_plain_layers(kind):
    seen = []
    model = nn.Sequential(quantised(kind))
    model[0].register_forward_hook(lambda *_: seen.append(1))
    x = numbers(4, 64)
    before = model(x)
    adapt(model, LoRA(r=3))
    perturb(model[0])
    truth, plain = Truth(model[0]), model[0].base
    other = copy.deepcopy(model)
    unload(model, merge=False)
    assert model[0] is plain
    assert find(model[0]) is not None
    same(model(x), before)
    unload(other, merge=True, dequantize=True)
    assert type(other[0]) is nn.Linear
    assert_close(other(x), truth(x), 2e-6)
    assert len(seen) == 3
    assert [name for name, _ in other.named_parameters()] == ["0.weight", "0.bias"]


# Whole models.


def mlp(kind):
    torch.manual_seed(0)
    layers = [KINDS[kind](nn.Linear(64, 128)), nn.GELU(), KINDS[kind](nn.Linear(128, 64)), nn.GELU(), nn.Linear(64, 4)]
    return nn.Sequential(*layers)


def llama(kind, dtype=torch.float32):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).to(dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, KINDS[kind](module))
    return model.requires_grad_(False)


TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


@every_library
@pytest.mark.parametrize("build", [mlp, llama])
def test_training_lowers_a_loss_and_leaves_the_codes_alone(kind, build):
    model = build(kind)
    targets = ["0", "2"] if build is mlp else TARGETS
    adapt(model, MAP(AdaLoRA(r=4)), targets)
    layers = adapted_layers(model)
    assert len(layers) == (2 if build is mlp else 8)
    assert {layer.kind for layer in layers.values()} == {find(layer.base).kind for layer in layers.values()}
    before = {name: codes_of(layer) for name, layer in layers.items()}
    tokens = torch.randint(3, 99, (4, 9), generator=torch.Generator().manual_seed(0))

    def loss():
        if build is mlp:
            return F.cross_entropy(model(numbers(16, 64)), torch.arange(16) % 4)
        return model(input_ids=tokens, labels=tokens).loss

    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    model.train()
    first = float(loss().detach())
    for _ in range(12):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    assert float(loss().detach()) < 0.95 * first
    for name, layer in layers.items():
        unchanged(layer, before[name])


@every_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llama_generates_with_adapters_and_merged(kind, dtype):
    model = llama(kind, dtype).eval()
    adapt(model, MAP(DoRA(LoRA(r=4))), TARGETS)
    for layer in adapted_layers(model).values():
        perturb(layer, 0.01)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        adapters = model(tokens).logits
        assert model.generate(tokens, max_new_tokens=4, do_sample=False).shape == (1, 7)
        report = merge(model, dequantize=True)
        assert set(report.lost) == set(adapted_layers(model))
        error = 0.1 if dtype == torch.bfloat16 or kind == "8-bit" else 1e-4
        assert_close(model(tokens).logits, adapters, error)
        assert model.generate(tokens, max_new_tokens=4, do_sample=False).shape == (1, 7)
        unmerge(model)
        same(model(tokens).logits, adapters)


@every_library
def test_what_a_file_holds_gives_the_same_outputs_again(kind):
    """The plain layers' own entries are there, under their own names; the adapters load into a model built anew."""
    model, names = mlp(kind), set(mlp(kind).state_dict())
    adapt(model, MAP(LoRA(r=4)), ["0", "2"])
    for layer in adapted_layers(model).values():
        perturb(layer)
    saved = model.state_dict()
    assert names <= set(saved)
    assert all("adapter." in name for name in set(saved) - names)
    again = mlp(kind)
    adapt(again, MAP(LoRA(r=4)), ["0", "2"], seed=5)
    assert not again(numbers(3, 64)).equal(model(numbers(3, 64)))
    missing = again.load_state_dict({k: v for k, v in saved.items() if ".adapter." in k}, strict=False).missing_keys
    assert not any("adapter" in name for name in missing)
    same(again(numbers(3, 64)), model(numbers(3, 64)))


@every_library
def test_a_saved_adapter_loads_onto_a_quantised_model(kind, tmp_path):
    model, again = mlp(kind), mlp(kind)
    adapt(model, MAP(AdaLoRA(r=4)), ["0", "2"])
    for layer in adapted_layers(model).values():
        perturb(layer)
    save(model, tmp_path)
    load(again, tmp_path)
    same(again(numbers(3, 64)), model(numbers(3, 64)))


@pytest.mark.parametrize("kind", ["8-bit", "torchao"])
@pytest.mark.parametrize("used", [False, True])
def test_whole_files_load_where_the_plain_layers_load_them(kind, used):
    model = nn.Sequential(quantised(kind, seed=7))
    adapt(model, LoRA(r=2))
    perturb(model[0])
    again = nn.Sequential(quantised(kind))
    if used:  # from here on bitsandbytes keeps the scales elsewhere
        again(numbers(3, 64))
    adapt(again, LoRA(r=2))
    again.load_state_dict(model.state_dict())
    assert_close(read(again[0].base, again[0].weight), read(model[0].base, model[0].weight), 1e-12)
    same(again(numbers(3, 64)), model(numbers(3, 64)))


@every_library
def test_copies_are_whole_and_apart(kind):
    model = nn.Sequential(quantised(kind))
    adapt(model, DoRA(LoRA(r=2)))
    perturb(model[0])
    other = copy.deepcopy(model)
    x = numbers(3, 64)
    same(other(x), model(x))
    perturb(other[0])
    assert not other(x).equal(model(x))
    assert other[0].weight is not model[0].weight
    same(other.to("cpu").to(torch.float32)(x), other(x))
    reset_adapters(other)
    same(other(x), plain_forward(quantised(kind), x))


# What bitsandbytes does to a 4-bit weight in evaluation, on processors with AVX512-BF16.


def packed(double):
    layer = quantised("nf4, double" if double else "nf4", 128, 64)
    pack = bnb.functional._convert_weight_packed_for_cpu
    layer.weight.data, layer.weight.quant_state = pack(layer.weight.data, layer.weight.quant_state)
    return layer


@pytest.mark.parametrize("double", [False, True])
def test_a_weight_packed_for_evaluation_keeps_its_values(double):
    plain = quantised("nf4, double" if double else "nf4", 128, 64)
    expected = read(plain) / 1.0
    layer = packed(double)
    scales = layer.weight.quant_state.absmax.mT.reshape(-1).double()  # rounded to bfloat16 by the library
    base = base_of(layer)
    W = read(layer)
    assert_close(W, expected, 2e-2)
    assert read(layer).abs().reshape(64, 2, 64).amax(dim=2).flatten().equal(scales)  # NF4 has the code 1
    assert_close(base.dense(), W, 2e-7)
    x = numbers(3, 128)
    y = AdaptedLinear(layer, LoRA(r=2)).eval()(x)
    assert_close(y, x.double() @ W.T + layer.bias, 1e-6)
    assert y.equal(layer.train()(x))


def test_scales_left_transposed_are_refused():
    layer = packed(double=False)
    unpack = bnb.functional._convert_weight_packed_for_cpu_inverse
    layer.weight.data, layer.weight.quant_state = unpack(layer.weight.data, layer.weight.quant_state)
    with pytest.raises(UnsupportedLayerError, match=r"layer 'q' is a Linear4bit .* in an order that its own forward"):
        AdaptedLinear(layer, LoRA(r=2), name="q")


@pytest.mark.parametrize("cols", [32, 64, 96, 100, 160, 256])
def test_layers_that_the_library_reads_wrongly_are_refused(cols):
    """Whether it does depends on the processor."""
    layer = quantised("nf4", cols, 64)
    theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    right = bool(torch.allclose(theirs.double(), read(layer), rtol=1e-6, atol=0))
    problem = find(layer).problem(layer)
    assert (problem is None) == right
    if problem is not None:
        assert f"in_features={cols} is no multiple of its blocksize 64" in problem


# What can't be adapted says so.


def refused(layer, match):
    model = nn.Sequential(nn.Linear(64, 64), layer)
    with pytest.raises(TargetError, match=match):
        adapt(model, LoRA(r=2), ["1"])
    with pytest.raises(UnsupportedLayerError, match=rf"layer '1' is a {type(layer).__name__} .*{match}"):
        AdaptedLinear(layer, LoRA(r=2), name="1")
    assert not adapted_layers(model)


def test_layers_that_are_not_quantised_yet_are_refused():
    refused(bnb.nn.Linear4bit(64, 32), r"not quantised yet.*model\.to\(device\)")
    refused(bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False), r"not quantised yet.*model\.to\(device\)")
    refused(bnb.nn.Linear8bitLt(64, 32), "has_fp16_weights=True")


def test_quantised_inputs_and_unchecked_tensors_are_refused():
    layer = nn.Sequential(nn.Linear(64, 32))
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    refused(layer[0], "inputs too; quantise weights alone")
    layer = nn.Sequential(nn.Linear(64, 32))
    quantize_(layer, IntxWeightOnlyConfig())
    refused(layer[0], "torchao's IntxUnpackedToInt8Tensor, whose products adapterzoo has not been checked with")


@every_library
def test_layers_with_a_forward_of_their_own_are_refused(kind):
    layer = quantised(kind)
    layer.forward = lambda x: x
    refused(layer, "a forward of its own")


@pytest.mark.parametrize(
    ("home", "name", "method"),
    [
        ("gptqmodel.nn_modules.qlinear.torch", "TorchQuantLinear", "GPTQ"),
        ("awq.modules.linear.gemm", "WQLinear_GEMM", "AWQ"),
        ("hqq.core.quantize", "HQQLinear", "HQQ"),
        ("transformers.integrations.finegrained_fp8", "FP8Linear", "quantised"),
    ],
)
def test_other_libraries_layers_are_refused_by_name(home, name, method):
    kind = type(name, (nn.Module,), {"__module__": home})
    refused(kind(), f"it is a {method} layer of {home}.*bitsandbytes' 4 or 8 bits, in torchao's int8 or unquantised")


def test_all_linear_means_quantised_layers_and_skips_those_that_it_cannot_adapt():
    other = type("HQQLinear", (nn.Module,), {"__module__": "hqq.core.quantize"})()
    model = nn.Sequential(*(quantised(kind, 64, 64) for kind in LIBRARIES), other, bnb.nn.Linear4bit(64, 64))
    plan = adapt(model, LoRA(r=2))
    assert list(adapted_layers(model)) == ["0", "1", "2"]
    reasons = {item.name: item.reason for item in plan.left_alone}
    assert "not quantised yet" in reasons["4"]


def test_without_the_libraries_nothing_is_looked_for(monkeypatch):
    for name in ("bitsandbytes.nn.modules", "torchao.utils"):
        monkeypatch.delitem(sys.modules, name)
    assert find(nn.Linear(4, 3)) is None
    assert find(nn.Embedding(4, 3)) is None


@every_library
def test_a_plan_counts_what_codes_stand_for(kind):
    """Two 4-bit numbers lie in a byte; the share of what trains is of the numbers."""
    plain = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
    model = nn.Sequential(KINDS[kind](plain[0]), nn.ReLU(), plain[2])
    total = sum(parameter.numel() for parameter in plain.parameters())
    for targets in (["0"], ["2"]):
        plan = adapt(copy.deepcopy(model), LoRA(r=2), targets)
        assert plan.total_parameters == total + plan.trainable_parameters
