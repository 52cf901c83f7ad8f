"""The kernel's own backward: against autograd through a dense weight, and among autograd's other machinery."""

import copy
import itertools
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adapterzoo import MAP, SORA, AdaLoRA, AdaptedLinear, DoRA, FLoRA, Full, LoRA, PreDiag, kernel, precision, wide
from adapterzoo.base import DenseBase
from adapterzoo.errors import UnfrozenBaseWarning
from adapterzoo.functional import factored_linear
from adapterzoo.kept import NormCache

T, OUT, IN, R = 5, 4, 3, 2
SIX_DEEP = DoRA(SORA(MAP(PreDiag(DoRA(MAP(LoRA(r=2, alpha=3)))))))
FULL = {"highest", "ieee", "none", None}  # what torch calls products of float32 in float32
SHAPES = {"delta": (OUT,), "U": (OUT, R), "V": (R, IN), "bias": (OUT,), "remainder": (OUT, IN)}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_base(seed=9):
    return DenseBase(drawn(OUT, IN, seed=seed), NormCache())


def perturbed(spec, out=5, cols=4, dtype=torch.float32, bias=True, **options):
    torch.manual_seed(0)
    layer = AdaptedLinear(nn.Linear(cols, out, bias=bias, dtype=dtype), spec, **options)
    with torch.no_grad():
        for parameter in layer.adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


COMBINATIONS = [
    (parts, shared, dropout)
    for n in range(len(SHAPES) + 1)
    for parts in itertools.combinations(SHAPES, n)
    if ("U" in parts) == ("V" in parts)
    for shared in ((False, True) if "delta" in parts else (False,))
    for dropout in ((0.0, 0.4) if "U" in parts else (0.0,))  # it acts on the update alone
]


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(("parts", "shared", "dropout"), COMBINATIONS)
def test_every_gradient_of_every_combination_of_terms(parts, shared, dropout, lean):
    """First derivatives and second ones, each against autograd through x W'ᵀ; some arguments want no gradient."""
    base, drop_rows = dense_base(), 1
    values = {name: drawn(*SHAPES[name], seed=i) for i, name in enumerate(parts)}
    if shared:
        values["delta"] = values["delta"][:1]
    x, dy = drawn(2, T, IN, seed=20), drawn(2, T, OUT, seed=21)
    torch.manual_seed(3)
    drop = kernel.Dropout.draw(x, dropout, drop_rows) if dropout else None
    keep = 1 if drop is None else (~drop.dropped).double() / (1 - drop.p)

    def dense(x, delta=0.0, U=None, V=None, bias=0.0, remainder=0.0):
        y = x @ base.weight.mT * (1 + delta) + bias
        y = y if isinstance(remainder, float) else y + x @ remainder.mT
        if U is None:
            return y
        return y + (x * keep) @ (U[:, :drop_rows] @ V[:drop_rows]).mT + x @ (U[:, drop_rows:] @ V[drop_rows:]).mT

    def ours(x, **values):
        torch.manual_seed(3)
        return factored_linear(x, base, **values, dropout=dropout, drop_rows=drop_rows, lean=lean)

    names = ["x", *values]
    for idle in [None, *names]:
        wanted = [name for name in names if name != idle]
        results = []
        for function in (ours, dense):
            leaves = {name: {"x": x, **values}[name].clone().requires_grad_(name != idle) for name in names}
            y = function(leaves["x"], **{name: leaves[name] for name in values})
            inputs = [leaves[name] for name in wanted]
            if not inputs:
                results.append([y])
                continue
            once = torch.autograd.grad(y, inputs, dy, retain_graph=True)
            again = torch.autograd.grad(y, inputs, dy, create_graph=True)
            size = sum(g.square().sum() for g in again)
            twice = torch.autograd.grad(size, inputs, allow_unused=True) if size.requires_grad else []
            twice = [torch.zeros_like(i) if g is None else g for g, i in zip(twice, inputs, strict=bool(twice))]
            results.append([y, *once, *again, *twice])
        for mine, true in zip(*results, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-11)


def test_one_operand_may_be_made_of_another():
    """Under a rotation V is made of δ: second derivatives must not count that path twice."""
    base = dense_base()
    delta = drawn(OUT, seed=1).requires_grad_()
    Y, U, x = drawn(R, OUT, seed=2), drawn(OUT, R, seed=3), drawn(T, IN, seed=4).requires_grad_()

    def second(y):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), delta)[0]

    def rotated():
        return (Y * (1 + delta)) @ base.weight

    dense = x @ (base.weight * (1 + delta)[:, None] + U @ rotated()).mT
    ours = factored_linear(x, base, delta, U, rotated())
    torch.testing.assert_close(second(ours), second(dense), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shared", [False, True])
def test_sums_of_products_go_by_blocks(shared, monkeypatch):
    x, delta = drawn(7, IN).requires_grad_(), drawn(1 if shared else OUT, seed=1).requires_grad_()
    base, gradients = dense_base(), []
    for block in (2**20, 2 * OUT, 1):  # one block, blocks of two rows, a row larger than a block
        monkeypatch.setattr(kernel, "_BLOCK", block)
        y = factored_linear(x, base, delta)
        gradients.append(torch.autograd.grad(y.square().sum(), delta)[0])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-13, atol=0)


# Lean: y is kept in the place of x Wᵀ.


@pytest.mark.parametrize("spec", [DoRA(LoRA(r=2)), PreDiag(LoRA(r=2)), SIX_DEEP, DoRA(Full())], ids=repr)
@pytest.mark.parametrize("bias", [False, True])
def test_lean_gives_the_same_gradients(spec, bias):
    results = []
    for lean in (False, True):
        layer = perturbed(spec, dtype=torch.float64, bias=bias, lean=lean)
        x = drawn(6, 4).requires_grad_()
        layer(x).square().sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in layer.adapter.parameters())])
    for thick, lean in zip(*results, strict=True):
        torch.testing.assert_close(lean, thick, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("gain", [0.0, 1e-9, 0.01])
def test_lean_never_divides_by_a_small_gain(gain):
    """A row with gain 0 has lost x Wᵀ: the product is formed anew."""
    gradients = []
    for lean in (False, True):
        delta = torch.full((OUT,), 0.5, dtype=torch.float64)
        delta[1] = gain - 1
        delta.requires_grad_()
        y = factored_linear(drawn(T, IN), dense_base(), delta, drawn(OUT, R, seed=1), drawn(R, IN, seed=2), lean=lean)
        gradients.append(torch.autograd.grad(y.square().sum(), delta)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("what", "size"), [("bias", 30.0), ("bias", 100.0), ("update", 100.0)])
def test_lean_keeps_its_digits_where_y_is_mostly_something_else(what, size):
    """In 16 bits y has lost x Wᵀ under a large bias or update."""
    base, errors = DenseBase(drawn(24, 32, seed=9).bfloat16(), NormCache()), []
    delta, bias = 0.2 * drawn(24, seed=1).float(), drawn(24, seed=2).bfloat16()
    U, V = 0.1 * drawn(24, R, seed=3).float(), drawn(R, 32, seed=4).float()
    bias, U = (size * bias, U) if what == "bias" else (bias, size * U)
    x, dy = drawn(256, 32, seed=5).bfloat16(), drawn(256, 24, seed=6).bfloat16()
    true = (dy.double() * (x.double() @ base.weight.double().mT)).sum(dim=0)
    for lean in (False, True):
        leaf = delta.clone().requires_grad_()
        factored_linear(x, base, leaf, U, V, bias, lean=lean).backward(dy)
        errors.append(float((leaf.grad - true).norm() / true.norm()))
    assert errors[1] < max(4 * errors[0], 1e-2), errors


def test_the_tests_of_lean_can_fail(monkeypatch):
    monkeypatch.setattr(kernel, "_LOST", float("inf"))
    with pytest.raises(AssertionError):
        test_lean_never_divides_by_a_small_gain(1e-9)
    with pytest.raises(AssertionError):
        test_lean_keeps_its_digits_where_y_is_mostly_something_else("bias", 100.0)


def test_in_place_operations_may_follow():
    layer, x = perturbed(SIX_DEEP), drawn(6, 4).float()
    gradients = []
    for inplace in (False, True):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.nn.functional.relu(layer(leaf), inplace=inplace).square().sum().backward()
        gradients.append([leaf.grad, *(parameter.grad.clone() for parameter in layer.adapter.parameters())])
    for mine, true in zip(*gradients, strict=True):
        assert torch.equal(mine, true)


def test_in_place_operations_after_a_lean_layer_are_torchs_error():
    y = perturbed(DoRA(LoRA(r=2)), lean=True)(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.relu_().sum().backward()


# What a backward may be asked for.


def test_a_base_changed_between_forward_and_backward_is_an_error():
    layer = perturbed(DoRA(LoRA(r=2)))
    y = layer(torch.randn(3, 4, requires_grad=True))
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("spec", [LoRA(r=2, dropout=0.3), MAP(LoRA(r=2)), SIX_DEEP], ids=repr)
def test_a_kept_graph_gives_its_gradients_again(spec):
    layer = perturbed(spec)
    y = layer(torch.randn(3, 4))
    parameters = list(layer.adapter.parameters())
    first = torch.autograd.grad(y.square().sum(), parameters, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(y.square().sum(), parameters), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("spec", [LoRA(r=2), MAP(LoRA(r=2)), SIX_DEEP], ids=repr)
def test_a_frozen_adapter_keeps_no_input(spec):
    """As a frozen nn.Linear: the input may be changed, or go, before the backward."""
    layer = perturbed(spec, dtype=torch.float64)
    layer.adapter.requires_grad_(False)
    leaf = drawn(3, 4).requires_grad_()
    hidden = leaf * 1
    y = layer(hidden)
    hidden.add_(1)
    y.sum().backward()
    torch.testing.assert_close(leaf.grad, layer.effective_weight().sum(dim=0).expand(3, 4))


def test_the_value_of_a_bias_is_not_kept():
    layer = perturbed(DoRA(LoRA(r=2)))
    y = layer(torch.randn(3, 4))
    with torch.no_grad():
        layer.bias.add_(1)
    y.sum().backward()


def test_what_wants_no_gradient_costs_nothing():
    """No ∂x for an input without grad, unless one shared gain needs ∂y W: counted by calls of the base."""
    layer = perturbed(DoRA(LoRA(r=2)))
    calls = []
    original = DenseBase.apply_t

    def counted(self, y):
        calls.append(y.shape)
        return original(self, y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenseBase, "apply_t", counted)
        layer(torch.randn(3, 4)).sum().backward()
        assert calls == []
        layer(torch.randn(3, 4, requires_grad=True)).sum().backward()
        assert len(calls) == 1
        shared = perturbed(MAP(LoRA(r=2)))  # the gradient of one shared gain is ⟨∂y W, x⟩
        shared(torch.randn(3, 4)).sum().backward()
        assert len(calls) == 2


@pytest.mark.parametrize("spec", [LoRA(r=2), MAP(LoRA(r=2)), SIX_DEEP], ids=repr)
def test_single_parameters_may_be_frozen(spec):
    names = [name for name, _ in perturbed(spec).adapter.named_parameters()]
    whole = perturbed(spec)
    whole(torch.ones(2, 4)).square().sum().backward()
    for trained in names:
        layer = perturbed(spec)
        for name, parameter in layer.adapter.named_parameters():
            parameter.requires_grad_(name == trained)
        layer(torch.ones(2, 4)).square().sum().backward()
        for name, parameter in layer.adapter.named_parameters():
            assert (parameter.grad is not None) == (name == trained)
        torch.testing.assert_close(layer.adapter.get_parameter(trained).grad, whole.adapter.get_parameter(trained).grad)


@pytest.mark.parametrize("spec", [LoRA(r=2), MAP(LoRA(r=2)), DoRA(LoRA(r=2))], ids=repr)
def test_a_base_whose_bias_trains(spec):
    layer = perturbed(spec, dtype=torch.float64)
    layer.bias.requires_grad_()
    x, dy = drawn(2, 3, 4), drawn(2, 3, 5, seed=1)
    layer(x).backward(dy)
    torch.testing.assert_close(layer.bias.grad, dy.sum(dim=(0, 1)))


@pytest.mark.parametrize("shape", [(4,), (0, 4), (1, 4), (2, 0, 3, 4), (2, 3, 4)])
@pytest.mark.parametrize("spec", [LoRA(r=2, dropout=0.2), MAP(LoRA(r=2)), SIX_DEEP], ids=repr)
def test_inputs_of_every_rank_and_of_no_tokens(spec, shape):
    layer = perturbed(spec, dtype=torch.float64)
    x = drawn(*shape).requires_grad_()
    y = layer.eval()(x)
    assert y.shape == (*shape[:-1], 5)
    torch.testing.assert_close(y, nn.functional.linear(x, layer.effective_weight(), layer.bias))
    layer.train()(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(parameter.grad is not None for parameter in layer.adapter.parameters())


def test_strided_inputs_and_gradients():
    layer = perturbed(SIX_DEEP, dtype=torch.float64)
    x = drawn(4, 6, 2).permute(1, 2, 0)
    leaf, plain = x.clone().requires_grad_(), x.contiguous().clone().requires_grad_()
    layer(leaf.permute(1, 0, 2)).sum().backward()  # an expanded gradient over a strided input
    layer(plain).backward(torch.ones(6, 2, 5, dtype=torch.float64))
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-12, atol=1e-12)


# Autocast, checkpointing, transforms.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [LoRA(r=2), MAP(LoRA(r=2)), DoRA(LoRA(r=2)), SIX_DEEP, MAP(Full())], ids=repr)
@pytest.mark.parametrize("lean", [False, True])
def test_gradients_under_autocast(spec, dtype, lean):
    """y in autocast's dtype, gradients in the dtypes of what they belong to, good to 16 bits."""
    layer, exact = perturbed(spec, 24, 32, lean=lean), perturbed(spec, 24, 32, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    x, dy = drawn(16, 32).float().requires_grad_(), drawn(16, 24, seed=1)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.backward(dy.to(dtype))  # outside autocast, as a training loop does
    x_true = x.detach().double().requires_grad_()
    exact(x_true).backward(dy)
    pairs = zip([x, *layer.adapter.parameters()], [x_true, *exact.adapter.parameters()], strict=True)
    for mine, true in pairs:
        assert mine.grad.dtype == mine.dtype
        error = (mine.grad.double() - true.grad).norm() / true.grad.norm()
        assert error < (3e-2 if dtype == torch.bfloat16 else 4e-3), (mine.shape, float(error))


def test_second_derivatives_under_autocast_follow_its_dtype():
    layer, x = perturbed(DoRA(LoRA(r=2))), drawn(6, 4).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    exact, x_true = perturbed(DoRA(LoRA(r=2)), dtype=torch.float64), x.detach().double().requires_grad_()
    exact.load_state_dict(layer.state_dict())
    (dx,) = torch.autograd.grad(exact(x_true).square().sum(), x_true, create_graph=True)
    dx.square().sum().backward()
    assert (x.grad.double() - x_true.grad).norm() / x_true.grad.norm() < 5e-2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("spec", [LoRA(r=2, dropout=0.5), DoRA(LoRA(r=2, dropout=0.5)), SIX_DEEP], ids=repr)
def test_checkpointing_repeats_the_forward_dropout_included(spec, reentrant):
    model = nn.Sequential(perturbed(spec), nn.GELU(), perturbed(spec, out=4, cols=5))
    x, gradients = torch.randn(6, 4), []
    for wrapped in (False, True):
        fresh = copy.deepcopy(model)
        optimiser = torch.optim.AdamW([p for p in fresh.parameters() if p.requires_grad], lr=0.1, fused=True)
        for _ in range(2):  # with a step between: nothing of the last pass may be used again
            torch.manual_seed(1)
            leaf = x.clone().requires_grad_()
            y = checkpoint(fresh, leaf, use_reentrant=reentrant) if wrapped else fresh(leaf)
            optimiser.zero_grad()
            y.square().sum().backward()
            optimiser.step()
        gradients.append([leaf.grad, *(p.grad.clone() for p in fresh.parameters() if p.grad is not None)])
    assert len(gradients[0]) > 4
    for mine, true in zip(*gradients, strict=True):
        assert torch.equal(mine, true)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")  # torch's own, of its jvp
@pytest.mark.parametrize("spec", [LoRA(r=2), SIX_DEEP, MAP(AdaLoRA(r=2)), DoRA(FLoRA(r=2))], ids=repr)
def test_forward_mode_agrees_with_reverse_mode(spec):
    layer = perturbed(spec, dtype=torch.float64)
    values = {f"adapter.{name}": p.detach() for name, p in layer.adapter.named_parameters()}
    x, tangent = drawn(3, 4), {name: torch.ones_like(value) for name, value in values.items()}

    def loss(values):
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    _, forward = torch.func.jvp(loss, (values,), (tangent,))
    reverse = sum(gradient.sum() for gradient in torch.func.grad(loss)(values).values())
    torch.testing.assert_close(forward, reverse)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        out = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    torch.testing.assert_close(out, torch.ones_like(x) @ layer.effective_weight().mT)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("spec", [DoRA(LoRA(r=2)), SORA(LoRA(r=2))], ids=repr)
def test_forward_mode_over_a_16_bit_weight(spec):
    layer = perturbed(spec, dtype=torch.bfloat16)
    values = {f"adapter.{name}": p.detach() for name, p in layer.adapter.named_parameters()}
    tangent = {name: torch.ones_like(value) for name, value in values.items()}

    def loss(values):
        return torch.func.functional_call(layer, values, (torch.ones(3, 4).bfloat16(),)).float().sum()

    _, forward = torch.func.jvp(loss, (values,), (tangent,))
    reverse = sum(gradient.sum() for gradient in torch.func.grad(loss)(values).values())
    torch.testing.assert_close(forward, reverse, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "spec", [LoRA(r=2), LoRA(r=2, dropout=0.4), MAP(FLoRA(r=2)), DoRA(LoRA(r=2, dropout=0.4)), SIX_DEEP, DoRA(Full())]
)
def test_several_gradients_in_one_backward(spec, dtype):
    """torch.autograd.grad(is_grads_batched=True), which jacobian and hessian with vectorize=True use."""
    layer, x = perturbed(spec, dtype=dtype), drawn(3, 4).to(dtype)
    parameters = list(layer.adapter.parameters())
    y, several = layer(x), drawn(2, 3, 5, seed=1).to(dtype)
    batched = torch.autograd.grad(y, parameters, several, is_grads_batched=True, retain_graph=True)
    for number, dy in enumerate(several):
        for whole, one in zip(batched, torch.autograd.grad(y, parameters, dy, retain_graph=True), strict=True):
            torch.testing.assert_close(whole[number], one)


@pytest.mark.parametrize("spec", [MAP(Full()), DoRA(Full(), detach_norm=False), MAP(LoRA(r=2))], ids=repr)
def test_second_derivatives_are_finite_at_the_start_and_on_a_zero_row(spec):
    linear = nn.Linear(4, 5, dtype=torch.float64)
    with torch.no_grad():
        linear.weight[0] = 0
    layer = AdaptedLinear(linear, spec)
    parameters = list(layer.adapter.parameters())
    loss = layer(drawn(3, 4)).square().sum()
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters, allow_unused=True)
    assert all(torch.isfinite(g).all() for g in second if g is not None)


def test_second_derivatives_of_row_norms_are_those_of_squares():
    rows = torch.cat([torch.zeros(1, 3), drawn(2, 3).float()]).double().requires_grad_()
    assert torch.autograd.gradcheck(wide.row_norms_sq, rows)
    assert torch.autograd.gradgradcheck(wide.row_norms_sq, rows)


def test_a_trained_base_gets_its_gradient_though_someone_asked_under_no_grad():
    layer = perturbed(DoRA(LoRA(r=2), detach_norm=False), dtype=torch.float64)
    layer.adapter.requires_grad_(False)
    layer.weight.requires_grad_()
    with pytest.warns(UnfrozenBaseWarning):
        site = layer.site()
    gradients = []
    for asks in (False, True):
        inside = layer.adapter.inner.weight(site)
        if asks:
            with torch.no_grad():
                inside.row_norms()
        gradients.append(torch.autograd.grad(inside.row_norms().sum(), layer.weight)[0])
    assert torch.equal(*gradients)


def test_one_call_of_the_kernel_serves_every_spec(monkeypatch):
    """With a gradient wanted, nothing goes around the function with its own backward."""
    calls = []
    original = kernel.FactoredLinear.apply
    monkeypatch.setattr(kernel.FactoredLinear, "apply", lambda *a: calls.append(1) or original(*a))
    specs = [wrap(g) for g in (LoRA(r=2), AdaLoRA(r=2), FLoRA(r=2), Full()) for wrap in (lambda g: g, MAP, DoRA, SORA)]
    for spec in specs:
        perturbed(spec)(torch.randn(2, 4)).sum().backward()
    assert len(calls) == len(specs)


# Precision of the factors.


@pytest.mark.parametrize("how", ["medium", "high", "allow_tf32", "flags"])
def test_factors_are_built_in_full_float32(how, monkeypatch):
    """Whatever the process allows its products, W Vᵀ runs without, and the setting is the user's again afterwards."""
    seen = []

    def state():
        return precision._float32_precisions()

    original = DenseBase.apply

    def watched(self, x, bias=None):
        seen.append(state())
        return original(self, x, bias)

    layer = perturbed(DoRA(LoRA(r=2)))
    try:
        if how == "allow_tf32":
            torch.backends.cuda.matmul.allow_tf32 = True
        elif how == "flags":
            if not precision._FLAGS:
                pytest.skip("this torch has no flags by backend")
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        else:
            torch.set_float32_matmul_precision(how)
        users = state()
        monkeypatch.setattr(DenseBase, "apply", watched)
        layer.factored_weight()
        assert seen
        assert FULL.issuperset(seen[0])
        assert state() == users
        seen.clear()
        layer(torch.randn(2, 4))
        assert seen[-1] == users  # the base product is the user's
        monkeypatch.setattr(DenseBase, "apply_t", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            perturbed(SORA(LoRA(r=2))).effective_weight()
        assert state() == users
    finally:
        torch.set_float32_matmul_precision("highest")
    assert FULL.issuperset(state())


def test_overlapping_threads_give_the_users_precision_back():
    """The first in, the second in, the first out, the second out: the last one restores."""
    torch.set_float32_matmul_precision("high")
    try:
        users, inside, leave = precision._float32_precisions(), threading.Event(), threading.Event()

        def other():
            with precision.full_precision("cpu"):
                inside.set()
                leave.wait(10)

        with precision.full_precision("cpu"):
            thread = threading.Thread(target=other)
            thread.start()
            assert inside.wait(10)
        assert FULL.issuperset(precision._float32_precisions())  # the other one is still at work
        leave.set()
        thread.join()
        assert precision._float32_precisions() == users
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_dropout_of_a_cpu_has_the_rate_that_it_says():
    x = torch.empty(1000, 403)
    torch.manual_seed(0)
    for p in (1e-7, 0.001, 0.1, 0.5, 0.9, 1 - 1e-7):
        drop = kernel.Dropout.draw(x, p, 1)
        assert abs(drop.p - p) <= 2**-17
        assert 0 < drop.p < 1
        error = (p * (1 - p) / x.numel()) ** 0.5
        for part in (drop.dropped, *(drop.dropped.flatten()[lane::4] for lane in range(4))):
            assert abs(float(part.float().mean()) - p) <= 5 * error * (x.numel() / part.numel()) ** 0.5 + 2**-17
    assert not torch.equal(kernel.Dropout.draw(x, 0.5, 1).dropped, kernel.Dropout.draw(x, 0.5, 1).dropped)


def watched_products(monkeypatch, *names):
    """What the base's own products give, in a list that grows."""
    made = []
    for name in names:
        original = getattr(DenseBase, name)
        monkeypatch.setattr(DenseBase, name, lambda *a, original=original: made.append(original(*a)) or made[-1])
    return made


def test_a_gradient_with_a_graph_counts_no_operand_twice():
    base, delta = dense_base(), drawn(OUT, seed=1).requires_grad_()
    V = (drawn(R, OUT, seed=2) * (1 + delta)) @ base.weight
    loss = factored_linear(drawn(T, IN), base, delta, drawn(OUT, R, seed=3), V).square().sum()
    (once,) = torch.autograd.grad(loss, delta, retain_graph=True)
    (again,) = torch.autograd.grad(loss, delta, create_graph=True)
    torch.testing.assert_close(again, once, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sign", [1, -1])
def test_lean_forms_no_product_anew_while_its_gains_are_large(sign, monkeypatch):
    made = watched_products(monkeypatch, "apply")
    delta = torch.full((OUT,), sign * 0.1 - 1, dtype=torch.float64).requires_grad_()
    factored_linear(drawn(T, IN), dense_base(), delta, lean=True).sum().backward()
    assert len(made) == 1


@pytest.mark.parametrize("spec", [LoRA(r=2), MAP(LoRA(r=2))], ids=repr)
def test_in_place_operations_may_follow_a_lean_layer_that_keeps_no_y(spec):
    perturbed(spec, lean=True)(torch.randn(3, 4)).relu_().sum().backward()


LEAN = [(LoRA(r=2), False), (MAP(LoRA(r=2)), False), (DoRA(LoRA(r=2)), True), (Full(), False)]


@pytest.mark.parametrize(("spec", "lean"), LEAN)
@pytest.mark.parametrize("grad", [False, True])
def test_y_takes_the_memory_of_the_base_product(spec, lean, grad, monkeypatch):
    layer, made = perturbed(spec, lean=lean), watched_products(monkeypatch, "apply")
    with torch.set_grad_enabled(grad):
        y = layer(torch.randn(3, 4))
    assert y.data_ptr() == made[-1].data_ptr()


def test_without_a_gradient_y_takes_it_from_a_gain_for_each_row_too(monkeypatch):
    layer, made = perturbed(DoRA(LoRA(r=2))), watched_products(monkeypatch, "apply")
    with torch.no_grad():
        assert layer(torch.randn(3, 4)).data_ptr() == made[-1].data_ptr()


@pytest.mark.parametrize("rows", [1, 24])
def test_16_bit_gradients_of_a_gain_are_rounded_once(rows):
    base, delta = DenseBase(drawn(24, 32).bfloat16(), NormCache()), drawn(rows, seed=1).float().requires_grad_()
    x, dy = drawn(16, 32, seed=2).bfloat16().requires_grad_(), drawn(16, 24, seed=3).bfloat16()
    factored_linear(x, base, delta).backward(dy)
    W, gain = base.weight, 1 + delta.detach()
    assert torch.equal(x.grad, (dy @ W * gain).bfloat16() if rows == 1 else (dy * gain).bfloat16() @ W)
    true = ((dy @ W).double() * x).sum()[None] if rows == 1 else (dy.double() * (x @ W.mT)).sum(dim=0)
    torch.testing.assert_close(delta.grad.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [LoRA(r=2), MAP(LoRA(r=2)), DoRA(LoRA(r=2)), MAP(Full())], ids=repr)
def test_autocast_around_the_backward_alone_changes_nothing(spec):
    gradients = []
    for autocast in (False, True):
        layer, x = perturbed(spec, 24, 32), drawn(16, 32).float().requires_grad_()
        loss = layer(x).square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss.backward()
        gradients.append([x.grad, *(p.grad for p in layer.adapter.parameters())])
    for mine, true in zip(*gradients, strict=True):
        assert torch.equal(mine, true)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_base_product_of_a_backward_has_the_autocast_dtype_of_the_forward(dtype, lean, monkeypatch):
    made = watched_products(monkeypatch, "apply", "apply_t")
    base = DenseBase(drawn(OUT, IN, seed=9).float(), NormCache())
    delta, x = torch.full((OUT,), -1.0).requires_grad_(), drawn(T, IN).float().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = factored_linear(x, base, delta, lean=lean)
    y.float().sum().backward(retain_graph=True)
    torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    assert [product.dtype for product in made] == [dtype] * (4 if lean else 3)


def test_the_gradient_of_a_float32_bias_is_not_rounded_under_autocast():
    layer, dy = perturbed(DoRA(LoRA(r=4)), 64, 48), drawn(32, 64, seed=1).bfloat16()
    layer.bias.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(drawn(32, 48).float()).backward(dy)
    torch.testing.assert_close(layer.bias.grad, dy.float().sum(dim=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [("U", "V"), ("U", "V", "remainder"), ("delta", "U", "V", "remainder")])
def test_the_sum_is_the_same_whoever_differentiates_it(parts):
    """Under autocast: autograd's own way (a base that trains), the kernel's, and that without a gradient."""
    shapes = {"delta": (24,), "U": (24, R), "V": (R, 32), "remainder": (24, 32)}
    values = {name: drawn(*shapes[name], seed=i).float() for i, name in enumerate(parts)}
    made = []
    for who in ("base", "kernel", "none"):
        base = DenseBase(drawn(24, 32, seed=5).float().requires_grad_(who == "base"), NormCache())
        x = drawn(16, 32, seed=6).float().requires_grad_(who == "kernel")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made.append(factored_linear(x, base, **values))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[1], made[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [LoRA(r=2), DoRA(LoRA(r=2)), SORA(LoRA(r=2)), Full()], ids=repr)
def test_adapters_may_be_stacked_over_one_base(spec, dtype):
    """vmap over the adapter's values alone: x Wᵀ has no batch dimension, so nothing is written into it."""
    layer, x = perturbed(spec, dtype=dtype), drawn(3, 4).to(dtype)
    one = {f"adapter.{name}": p.detach() for name, p in layer.adapter.named_parameters()}
    other = {name: 1.5 * value for name, value in one.items()}

    def call(values):
        return torch.func.functional_call(layer, values, (x,))

    both = torch.func.vmap(call)({name: torch.stack([one[name], other[name]]) for name in one})
    each = torch.stack([call(one), call(other)])
    torch.testing.assert_close(both, each, **({} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}))


def test_a_rare_dropout_drops_as_often_as_it_says():
    """At one step of 2^16, one step more would be seen; the factor goes by the steps that were drawn."""
    torch.manual_seed(0)
    drop = kernel.Dropout.draw(torch.empty(1).expand(2**11, 2**13), 1.4 * 2**-16, 1)
    assert drop.p == 2**-16
    assert abs(int(drop.dropped.sum()) - 2**8) < 6 * 2**4


def test_every_element_of_every_sample_is_dropped_by_itself():
    draw = torch.func.vmap(lambda x: kernel.Dropout.draw(x, 0.5, 1).dropped, randomness="different")
    assert len(draw(torch.ones(2, 2, 50)).flatten(0, 1).unique(dim=0)) == 4


@pytest.mark.parametrize(("block", "count"), [(2**20, 1), (2 * OUT, 4), (1, 7)])
def test_sums_are_cut_into_blocks(block, count, monkeypatch):
    monkeypatch.setattr(kernel, "_BLOCK", block)
    assert len(kernel._blocks(drawn(7, OUT), drawn(7, OUT))) == count


@pytest.mark.parametrize("what", ["effective_weight", "delta_weight"])
def test_dense_weights_are_formed_in_full_precision_under_autocast(what):
    layer = perturbed(LoRA(r=2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = getattr(layer, what)()
    assert torch.equal(inside, getattr(layer, what)())


@pytest.mark.parametrize("rotated", [False, True])
def test_norms_taken_without_a_gradient_take_none_from_later_ones(rotated):
    gradients = []
    for before in (False, True):
        layer, Y = perturbed(LoRA(r=2), dtype=torch.float64), drawn(2, 5, seed=1).requires_grad_()
        weight = layer.factored_weight()
        if before:
            with torch.no_grad():
                weight.row_norms()
        weight = weight.rotate(drawn(5, 2), Y) if rotated else weight
        weight.row_norms().square().sum().backward()
        gradients.append([p.grad for p in layer.adapter.parameters()])
    for mine, true in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("spec", [DoRA(MAP(DoRA(LoRA(r=2)))), DoRA(SORA(DoRA(LoRA(r=2))))], ids=repr)
def test_every_row_of_v_meets_the_base_once(spec, monkeypatch):
    layer, made = perturbed(spec), watched_products(monkeypatch, "apply")
    V = layer.factored_weight().V.value
    assert sum(len(rows) for rows in made) == len(V)
