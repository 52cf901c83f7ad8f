"""What each piece promises by itself: norm identities of wrappers, equivalences between pieces, whatever the inside."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import adapted, tree_of
from strategies import Case, cases, layer_of, stream
from torch import nn

from adapterzoo import MAP, SORA, AdaLoRA, AdaptedLinear, DoRA, FLoRA, Full, LoRA, PreDiag, PublishedSORA
from adapterzoo.functional import factored_linear

BOTH = (torch.float64, torch.float32)
EPS = {torch.float64: 4e-15, torch.float32: 1e-6}
ORDINARY = ("plain", "zero rows", "duplicate rows", "rank one")


def wrapped(case: Case, wrap) -> tuple[AdaptedLinear, torch.Tensor, torch.Tensor]:
    """The perturbed layer of wrap(case.spec), its effective weight, and the weight of its inside."""
    layer = layer_of(Case(**{**vars(case), "spec": wrap(case.spec)}))
    inside = layer.adapter.inner.weight(layer.site()).dense()
    return layer, layer.effective_weight().detach(), inside.detach()


def assert_close(actual, expected, tolerance=1e-9):
    actual, expected = actual.detach(), expected.detach()
    scale = float(expected.norm()) + 1e-300
    assert float((actual - expected).norm()) <= tolerance * scale, (actual, expected)


@given(cases(dtypes=BOTH, families=ORDINARY, depth=5), st.booleans())
def test_dora_row_norms_are_its_magnitudes(case, detach):
    layer, weight, inside = wrapped(case, lambda inner: DoRA(inner, detach_norm=detach))
    kappa = adapted(layer.weight.detach().double(), tree_of(layer.adapter)[0]).kappa
    assume(kappa < 1e3)
    lives = inside.norm(dim=1) > 0
    assert_close(weight.norm(dim=1)[lives], layer.adapter.magnitude.detach().abs()[lives], kappa * EPS[case.dtype])
    dead = inside.norm(dim=1) == 0
    assert not weight[dead].any()


@pytest.mark.parametrize("detach", [True, False])
def test_a_zero_row_under_dora_stays_zero_in_value_and_gradient(detach):
    layer = layer_with(DoRA(LoRA(r=2), detach_norm=detach))
    with torch.no_grad():
        layer.weight[1] = 0
        layer.adapter.inner.B.normal_()
        layer.adapter.inner.B[1] = 0
        layer.adapter.magnitude.uniform_(0.5, 2)
    assert not layer.effective_weight()[1].any()
    layer(torch.randn(6, 7, dtype=torch.float64)).square().sum().backward()
    for gradient in (layer.adapter.magnitude.grad, layer.adapter.inner.B.grad):
        assert not gradient[1].any()
        assert gradient[[0, 2, 3, 4]].any()


@given(cases(dtypes=BOTH, families=ORDINARY, depth=5))
def test_map_is_a_sphere_around_the_scaled_base(case):
    layer, weight, _ = wrapped(case, MAP)
    node = adapted(layer.weight.detach().double(), tree_of(layer.adapter.inner)[0])
    W, size = layer.weight.detach().double(), float(layer.weight.detach().double().norm())
    assume(float(node.update.detach().norm()) > 1.001e-2 * size > 0)
    alpha, beta = layer.adapter.alpha.detach().double(), layer.adapter.beta.detach().double()
    radius = (weight.double() - alpha * W / size).norm()
    terms = float(alpha.abs() + beta.abs()) * (1 + float(node.mass.norm() / node.update.detach().norm()) ** 2)
    assume(node.kappa * terms < 1e3 * float(beta.abs()))
    assert abs(float(radius - beta.abs())) <= EPS[case.dtype] * node.kappa * terms


@given(cases(families=("plain",), depth=0, full=False), st.sampled_from([0.5, 3.0, 100.0]))
def test_map_ignores_the_size_of_an_update_above_its_floor(case, factor):
    layer, weight, inside = wrapped(case, MAP)
    W = layer.weight.detach()
    assume(float((inside - W).norm()) * min(1.0, factor) > 1e-2 * float(W.norm()))
    innermost = layer.adapter.inner
    scaled = {"LoRA": "B", "AdaLoRA": "lam", "FLoRA": "core"}[type(innermost.spec).__name__]
    with torch.no_grad():
        getattr(innermost, scaled).mul_(factor)
    assert_close(layer.effective_weight(), weight)


@given(cases(dtypes=BOTH, families=ORDINARY, depth=5), st.sampled_from(["cayley", "exp"]), st.integers(1, 3))
def test_rotations_keep_norms_columns_and_singular_values(case, name, rank):
    layer, weight, inside = wrapped(case, lambda inner: SORA(inner, rank=min(rank, case.out), map=name))
    size = float(adapted(layer.weight.detach().double(), tree_of(layer.adapter)[0]).mass.norm() + layer.weight.norm())
    tolerance = EPS[case.dtype] * size / max(float(inside.norm()), 1e-30)
    assume(tolerance < 0.1)
    assert_close(weight.norm(), inside.norm(), tolerance)
    assert_close(weight.norm(dim=0), inside.norm(dim=0), tolerance)
    assert_close(torch.linalg.svdvals(weight), torch.linalg.svdvals(inside), tolerance)


@given(cases(families=ORDINARY, depth=4), st.sampled_from(["cayley", "exp"]), st.integers(1, 3))
def test_the_inverse_rotation_gives_the_inside_back(case, name, rank):
    """Exchanging C and D turns the skew matrix over: a second SORA with them exchanged undoes the first."""
    rank = min(rank, case.out)
    layer, _, _ = wrapped(case, lambda inner: SORA(SORA(inner, rank=rank, map=name), rank=rank, map=name))
    outer, first = layer.adapter, layer.adapter.inner
    with torch.no_grad():
        outer.C.copy_(first.D)
        outer.D.copy_(first.C)
        once = first.weight(layer.site()).dense()
        before = first.inner.weight(layer.site()).dense()
    assert_close(layer.effective_weight(), before, 1e-11)
    if case.out > 1 and before.any():
        assert not torch.allclose(once, before, rtol=1e-6)


@pytest.mark.parametrize("turn", [1.0, 100.0, 1000.0, 3000.0])
def test_the_exponential_turns_far_without_stretching(turn):
    C, D = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = float(torch.linalg.matrix_norm(D @ C.T - C @ D.T, ord=2))
    E = (D - C) * turn / size
    X, Y = SORA(LoRA(r=1), rank=2, map="exp")._thin_rotation(C, C + E)
    R = torch.eye(6, dtype=torch.float64) + X @ Y
    assert float((R.T @ R - torch.eye(6)).norm()) < 1e-11 * max(1.0, turn)


@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 99), st.sampled_from(["cayley", "exp"]))
def test_rotations_are_orthogonal_and_have_their_inverse(out, rank, seed, name):
    draw = torch.Generator().manual_seed(seed)
    spec = SORA(LoRA(r=1), rank=min(rank, out), map=name)
    C, D = torch.randn(2, out, spec.rank, generator=draw, dtype=torch.float64)
    identity = torch.eye(out, dtype=torch.float64)

    def rotation(C, D):
        X, Y = spec._thin_rotation(C, D)
        return identity + X @ Y

    R = rotation(C, D)
    assert_close(R.T @ R, identity, 1e-11)
    assert_close(rotation(D, C) @ R, identity, 1e-11)  # exchanging C and D turns the skew matrix over
    assert float(torch.linalg.det(R)) == pytest.approx(1.0)


def test_first_order_is_no_rotation_and_says_so():
    """I + P stretches by √(1 + p²), with p the singular values of the skew P."""
    C, D = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X, Y = SORA(LoRA(r=1), rank=2, map="first_order")._thin_rotation(C, D)
    P = D @ C.T - C @ D.T
    assert_close(X @ Y, P, 1e-12)
    stretched = torch.linalg.svdvals(torch.eye(6, dtype=torch.float64) + X @ Y)
    assert_close(stretched, (1 + torch.linalg.svdvals(P) ** 2).sqrt(), 1e-12)
    assert float(stretched.max()) > 1.5


def test_float32_rotations_near_the_start_keep_their_digits():
    """‖(R − I) W‖ at ‖D − C‖ = 1e-4 ‖C‖, where D Cᵀ and C Dᵀ cancel to four digits."""
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(64, 48, generator=draw)
    C = torch.randn(64, 4, generator=draw)
    D = C + 1e-4 * torch.randn(64, 4, generator=draw)
    layer = AdaptedLinear(nn.Linear(48, 64), SORA(LoRA(r=1)))
    with torch.no_grad():
        layer.weight.copy_(W)
        layer.adapter.C.copy_(C)
        layer.adapter.D.copy_(D)
    norm = float(layer.factored_weight().update_norm().detach())
    P = D.double() @ C.double().T - C.double() @ D.double().T
    identity = torch.eye(64, dtype=torch.float64)
    true = float((torch.linalg.solve(identity - P / 2, P) @ W.double()).norm())
    assert norm == pytest.approx(true, rel=3e-5)


@given(cases(families=ORDINARY, depth=4))
def test_prediag_of_ones_is_its_inside(case):
    layer, _, inside = wrapped(case, PreDiag)
    with torch.no_grad():
        layer.adapter.diag.fill_(1.0)
    assert_close(layer.effective_weight(), inside)


@given(cases(families=("plain",), depth=0))
def test_dora_of_a_zero_update_is_a_prediag(case):
    spec = case.spec
    dora = layer_of(Case(**{**vars(case), "spec": DoRA(spec)}), perturbed=False)
    prediag = layer_of(Case(**{**vars(case), "spec": PreDiag(spec)}), perturbed=False)
    gains = 1 + 0.5 * torch.randn(case.out, generator=stream(case, 8), dtype=torch.float64)
    with torch.no_grad():
        dora.adapter.magnitude.mul_(gains)
        prediag.adapter.diag.copy_(gains)
    assert_close(dora.effective_weight(), prediag.effective_weight())


def layer_with(spec, seed=0, out=5, cols=7, dtype=torch.float64):
    torch.manual_seed(seed)
    return AdaptedLinear(nn.Linear(cols, out, dtype=dtype), spec, seed=seed)


def test_adalora_with_unit_values_is_the_lora_of_the_same_product():
    ada, lora = layer_with(AdaLoRA(r=3, alpha=7)), layer_with(LoRA(r=3, alpha=7))
    with torch.no_grad():
        ada.adapter.lam.fill_(1.0)
        lora.adapter.B.copy_(ada.adapter.P)
        lora.adapter.A.copy_(ada.adapter.Q)
    assert ada.delta_weight().any()
    assert_close(ada.effective_weight(), lora.effective_weight())


def test_adalora_all_masked_is_the_base_under_every_wrapper():
    for wrap in (lambda s: s, MAP, DoRA, PreDiag, SORA, lambda s: MAP(DoRA(s))):
        layer = layer_with(wrap(AdaLoRA(r=3)))
        innermost = next(m for m in layer.adapter.modules() if hasattr(m, "mask"))
        with torch.no_grad():
            innermost.lam.normal_()
            assert layer.delta_weight().any()
            innermost.mask.zero_()
        assert torch.equal(layer.effective_weight(), layer.weight), layer.spec
        layer(torch.randn(2, 7, dtype=torch.float64)).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.adapter.parameters())


def test_flora_with_an_identity_core_is_lora_with_its_factors_exchanged():
    flora, lora = layer_with(FLoRA(r=3, scale=2.0)), layer_with(LoRA(r=3, alpha=6))
    with torch.no_grad():
        flora.adapter.core.copy_(torch.eye(3))
        lora.adapter.B.copy_(flora.adapter.A)
        lora.adapter.A.copy_(flora.adapter.B)
    assert flora.delta_weight().any()
    assert_close(flora.effective_weight(), lora.effective_weight())


def test_published_sora_is_the_published_forward_without_a_bias():
    """(I + P)[(diag(d) W + s B A) x], P damped by 1/(‖C‖ + ‖D‖ + 1e-6): written out, with every parameter perturbed."""
    spec = PublishedSORA(r=3, alpha=5, rank=2)
    torch.manual_seed(3)
    layer = AdaptedLinear(nn.Linear(7, 5, bias=False, dtype=torch.float64), spec)
    with torch.no_grad():
        for parameter in layer.adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
    C, D = layer.adapter.C.detach(), layer.adapter.D.detach()
    d, A, B = layer.adapter.inner.diag.detach(), layer.adapter.inner.inner.A, layer.adapter.inner.inner.B
    damping = min(1.0, 1.0 / float(C.norm() + D.norm() + 1e-6))
    assert damping < 1
    x = torch.randn(4, 7, dtype=torch.float64)
    combined = d * (x @ layer.weight.T) + 5 / 3 * (x @ A.T) @ B.T
    P = damping * (D @ C.T - C @ D.T)
    assert_close(layer(x), combined + combined @ P.T, 1e-12)


@given(cases(families=("zero",)))
def test_a_zero_weight_stays_finite(case):
    layer = layer_of(case)
    layer(torch.randn(3, case.cols, dtype=torch.float64)).square().sum().backward()
    assert torch.isfinite(layer.effective_weight()).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.adapter.parameters())


SPECS = [
    MAP(DoRA(SORA(PreDiag(LoRA(r=2)), rank=1, map="exp"), detach_norm=False)),
    DoRA(MAP(FLoRA(r=(2, 3))), detach_norm=False),
    DoRA(MAP(PreDiag(Full())), detach_norm=False),
    SORA(DoRA(AdaLoRA(r=2), detach_norm=False), rank=2, map="first_order", damping=0.5),
]


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_gradcheck_through_a_whole_layer(spec):
    """Numerical first derivatives of the layer in x, the base bias and every parameter (no norm is detached here)."""
    layer = layer_with(spec, out=4, cols=3)
    names = [name for name, _ in layer.adapter.named_parameters()]
    torch.manual_seed(1)
    values = [(p.detach() + 0.4 * torch.randn_like(p)).requires_grad_() for p in layer.adapter.parameters()]
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        named = {f"adapter.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(layer, named, (x,))

    assert torch.autograd.gradcheck(call, (x, *values))


def test_gradcheck_and_second_derivatives_of_the_kernel():
    layer = layer_with(LoRA(r=2), out=4, cols=3)
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 3), (4,), (4, 2), (2, 3), (4,)]
    inputs = [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]
    base = layer.site().base

    def call(x, delta, U, V, bias):
        return factored_linear(x, base, delta, U, V, bias)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_a_dense_update_that_cancels_a_row_under_dora():
    layer = layer_with(DoRA(Full()))
    with torch.no_grad():
        layer.adapter.inner.delta[0] = -layer.weight[0]
    assert not layer.effective_weight()[0].any()
    assert layer.effective_weight()[1:].any()


@pytest.mark.parametrize(("ranks", "rank"), [((4, 2), 2), ((2, 4), 2), ((3, 3), 3)])
def test_floras_normal_form_has_the_smaller_rank(ranks, rank):
    assert AdaptedLinear(nn.Linear(4, 5), FLoRA(r=ranks)).factored_weight().U.shape == (5, rank)
