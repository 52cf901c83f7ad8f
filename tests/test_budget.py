"""AdaLoRA's rank allocation, against a plain float64 reimplementation of the paper's formulas."""

import copy
import math
import warnings

import pytest
import torch
from reference import adapted, tree_of
from torch import nn

import adapterzoo as az
from adapterzoo import MAP, SORA, AdaLoRA, AdaptedLinear, DoRA, PreDiag
from adapterzoo.errors import SpecError, TrainingError
from adapterzoo.methods.budget import Budget, allocate
from adapterzoo.methods.importance import SENSITIVITY, UNCERTAINTY
from adapterzoo.rules import Member
from adapterzoo.training.held import pull_of_norms

X = torch.randn(32, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
Y = torch.randn(32, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def model_with(spec, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 9, bias=False), nn.Tanh(), nn.Linear(9, 5)).to(dtype)
    az.adapt(model, spec, seed=seed)
    return model


def adapters(model):
    return [layer.adapter for layer in az.adapted_layers(model).values()]


def generators(model):
    return [adapter.generator for adapter in adapters(model)]


def optimiser_of(model, lr=1e-2, kind=torch.optim.AdamW, **options):
    return kind([p for p in model.parameters() if p.requires_grad], lr=lr, **options)


def masks(model):
    return [generator.mask.tolist() for generator in generators(model)]


def step(model, optimiser, loss=None):
    optimiser.zero_grad()
    loss = (model(X.to(model[0].weight.dtype)) - Y.to(model[0].weight.dtype)).square().mean() if loss is None else loss
    loss.backward()
    optimiser.step()


def perturbed(model, size=0.3, seed=5):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))
    return model


# The schedule.


def test_the_budget_falls_by_the_papers_cubic():
    rule = Budget(t_init=10, t_final=20, delta_t=1)
    at = [rule.at(t, 100, 96, 48) for t in range(101)]
    assert at[:11] == [96] * 11
    assert at[80:] == [48] * 21
    assert all(at[t] == int(48 + 48 * (1 - (t - 10) / 70) ** 3) for t in range(11, 80))
    assert at == sorted(at, reverse=True)


def test_masks_change_only_when_the_schedule_says_so_and_end_on_the_target():
    model = model_with(AdaLoRA(r=4, target_r=2, t_init=4, t_final=7, delta_t=5))
    optimiser = optimiser_of(model)
    attachment = az.attach(model, optimiser, total_steps=15)
    before, changes = masks(model), []
    for t in range(1, 19):
        step(model, optimiser)
        if masks(model) != before:
            changes.append(t)
        before = masks(model)
        assert sum(az.ranks(model).values()) <= 12
    assert changes == [5, 8]  # 8 is T − t_final, though no multiple of delta_t
    assert sum(az.ranks(model).values()) == 6
    assert attachment.step == 18
    for generator in generators(model):
        assert not generator.lam[generator.mask == 0].any()


def test_the_global_budget_sums_over_layers_with_ranks_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    az.adapt(model, targets={"0": AdaLoRA(r=5, target_r=1), "2": AdaLoRA(r=3, target_r=3)})
    optimiser = optimiser_of(model)
    az.attach(model, optimiser, total_steps=10)
    for _ in range(10):
        step(model, optimiser)
    assert sum(az.ranks(model).values()) == 4


def test_layers_with_another_schedule_have_a_budget_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    az.adapt(model, targets={"0": AdaLoRA(r=4, target_r=1), "2": AdaLoRA(r=4, target_r=2, t_init=3)})
    optimiser = optimiser_of(model)
    az.attach(model, optimiser, total_steps=8)
    for _ in range(8):
        step(model, optimiser)
    assert az.ranks(model) == {"0": 1, "2": 2}


# Importance, scores and masks, against the formulas written out.


def test_every_step_agrees_with_the_formulas_written_out():
    spec = AdaLoRA(r=4, alpha=6, target_r=1, t_init=2, t_final=3, delta_t=2, beta1=0.7, beta2=0.6, orth_weight=0.3)
    model = perturbed(model_with(spec))
    optimiser = optimiser_of(model, lr=3e-2)
    az.attach(model, optimiser, total_steps=16)
    twin = copy.deepcopy(model)  # trains by hand: the penalty in the loss, masks from the formulas
    by_hand = optimiser_of(twin, lr=3e-2)
    mean, spread = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", az.errors.UnattendedWarning)  # as it should: the twin is trained by hand
        for t in range(1, 17):
            step(model, optimiser)
            step(twin, by_hand, (twin(X) - Y).square().mean() + dense_penalty(twin, 0.3))
            if t <= 13:
                for key, value in named(twin):
                    importance = (value.detach() * value.grad).abs()
                    mean[key] = 0.7 * mean.get(key, 0) + 0.3 * importance
                    spread[key] = 0.6 * spread.get(key, 0) + 0.4 * (importance - mean[key]).abs()
            if 2 < t <= 13 and (t % 2 == 0 or t == 13):
                budget = int(3 + 9 * (1 - (t - 2) / 11) ** 3)
                scores = torch.stack([score(mean, spread, i) for i in range(3)])
                best = set(scores.flatten().argsort(descending=True)[:budget].tolist())
                for i, generator in enumerate(generators(twin)):
                    new = torch.tensor([float(4 * i + j in best) for j in range(4)], dtype=torch.float64)
                    generator.mask.copy_(new)
                    generator.lam.data.mul_(generator.mask)
            if t > 13:
                for generator in generators(twin):
                    generator.lam.data.mul_(generator.mask)
            assert masks(model) == masks(twin), t
            for (key, value), (_, other) in zip(named(model), named(twin), strict=True):
                torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-12)
                if t <= 13:
                    torch.testing.assert_close(optimiser.state[value][SENSITIVITY], mean[key], rtol=1e-8, atol=1e-14)
                    torch.testing.assert_close(optimiser.state[value][UNCERTAINTY], spread[key], rtol=1e-8, atol=1e-14)
    assert sum(map(sum, masks(model))) == 3


def named(model):
    return [((i, n), p) for i, g in enumerate(generators(model)) for n, p in g.named_parameters(recurse=False)]


def score(mean, spread, i):
    s = {name: mean[i, name] * spread[i, name] for name in ("P", "lam", "Q")}
    return s["lam"] + s["P"].mean(dim=0) + s["Q"].mean(dim=1)


def dense_penalty(model, weight):
    terms = []
    for g in generators(model):
        eye = torch.eye(g.lam.numel(), dtype=g.lam.dtype)
        terms += [(g.P.T @ g.P - eye).square().sum().sqrt(), (g.Q @ g.Q.T - eye).square().sum().sqrt()]
    return weight * sum(terms) / len(terms)


def test_the_gradient_of_lambda_is_that_of_lambda_times_mask():
    layer = perturbed(AdaptedLinear(nn.Linear(7, 5).double(), AdaLoRA(r=4, alpha=6)))
    layer.adapter.mask[1] = 0
    functional = torch.randn(32, 5, dtype=torch.float64)
    (layer(X) * functional).sum().backward()
    P, lam, Q = layer.adapter.P.detach(), layer.adapter.lam.detach(), layer.adapter.Q.detach()
    G = functional.T @ X
    torch.testing.assert_close(layer.adapter.lam.grad, torch.einsum("or,oi,ri->r", P, G, Q) * 1.5)
    assert layer.adapter.lam.grad[1] != 0
    assert not layer.adapter.P.grad[:, 1].any()
    assert not layer.adapter.Q.grad[1].any()
    dense = P @ torch.diag(1.5 * lam * torch.tensor([1.0, 0, 1, 1])) @ Q
    torch.testing.assert_close(layer(X), X @ (layer.weight + dense).T + layer.bias)


def test_a_masked_triplet_may_return_until_t_final():
    """All there is to learn lies along the triplet that is masked at the start."""
    for mask_at, returns in ((0, True), (30, False)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5)).double()
        az.adapt(model, AdaLoRA(r=2, target_r=1, t_final=20, delta_t=5, orth_weight=0))
        generator = model[0].adapter
        for factor in (generator.P, generator.Q):
            factor.requires_grad_(False)
        generator.P.copy_(torch.eye(5, 2))
        generator.Q.copy_(torch.eye(2, 7))
        goal = model(X).detach() + 3 * X @ torch.outer(generator.P[:, 0], generator.Q[0]).T
        optimiser = optimiser_of(model, lr=0.1)
        az.attach(model, optimiser, total_steps=50)
        for t in range(50):
            if t == mask_at:
                generator.mask.copy_(torch.tensor([0.0, 1.0]))
            step(model, optimiser, (model(X) - goal).square().mean())
        assert generator.mask.tolist() == ([1, 0] if returns else [0, 1])
        assert (generator.lam[0] != 0) == returns


# Ties and other edges.


def test_ties_keep_exactly_the_budget_spread_over_the_layers():
    members = [
        Member(str(i), AdaLoRA(r=4, target_r=2), {"mask": torch.ones(4), "lam": torch.zeros(4)}, {}) for i in range(3)
    ]
    allocate(members, 7)
    assert [member.values["mask"].tolist() for member in members] == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]


def test_without_any_gradient_the_budget_is_kept_all_the_same():
    model = model_with(AdaLoRA(r=4, target_r=2, orth_weight=0))
    optimiser = optimiser_of(model)
    az.attach(model, optimiser, total_steps=5)
    for _ in range(5):
        step(model, optimiser, model(torch.zeros_like(X)).sum() * 0)
    assert sum(az.ranks(model).values()) == 6


def test_a_target_that_is_the_rank_changes_nothing():
    model = model_with(AdaLoRA(r=3, target_r=3))
    optimiser = optimiser_of(model)
    az.attach(model, optimiser, total_steps=6)
    for _ in range(8):
        step(model, optimiser)
        assert all(all(mask) for mask in masks(model))


def test_a_target_above_the_rank_is_an_error():
    with pytest.raises(SpecError, match=r"AdaLoRA: target_r=5 is above r=4; .* 1 ≤ target_r ≤ r"):
        AdaLoRA(r=4, target_r=5)
    with pytest.raises(SpecError, match="delta_t, t_init without target_r does nothing: the rank stays 4"):
        AdaLoRA(r=4, t_init=3, delta_t=2)
    with pytest.raises(SpecError, match=r"beta1=1\.0 is not valid"):
        AdaLoRA(r=4, target_r=2, beta1=1.0)
    assert AdaLoRA(r=4, orth_weight=0.5).step_rule() is None


def test_a_schedule_without_room_is_an_error():
    model = model_with(AdaLoRA(r=4, target_r=2, t_init=6, t_final=4))
    optimiser = optimiser_of(model)
    with pytest.raises(TrainingError, match=r"layer '0'.*t_init=6 and t_final=4 leave none of 10 steps.*above 10"):
        az.attach(model, optimiser, total_steps=10)
    az.attach(model, optimiser, total_steps=11)


def test_a_layer_that_loses_all_its_triplets_goes_on_as_its_base():
    for wrap in (lambda g: g, MAP, DoRA, lambda g: SORA(PreDiag(g), rank=2), lambda g: MAP(DoRA(g))):
        model = perturbed(model_with(wrap(AdaLoRA(r=2, target_r=1))))
        generators(model)[1].mask.zero_()
        (model(X) - Y).square().mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        before = model(X)
        assert az.compact(model)["2"] == 0
        torch.testing.assert_close(model(X), before, rtol=1e-12, atol=1e-12)
        model(X).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        az.merge(model)
        torch.testing.assert_close(model.requires_grad_(False)(X), before, rtol=1e-12, atol=1e-12)


# What importance means under wrappers.

NORMALISING = [
    MAP(AdaLoRA(r=3, target_r=1)),
    MAP(AdaLoRA(r=3, target_r=1), floor=1e-4),
    MAP(AdaLoRA(r=3, target_r=1), floor=1e3),  # below the floor: linear
    DoRA(AdaLoRA(r=3, target_r=1), detach_norm=False),
    MAP(DoRA(AdaLoRA(r=3, target_r=1))),
    MAP(DoRA(AdaLoRA(r=3, target_r=1), detach_norm=False)),
    DoRA(SORA(MAP(PreDiag(AdaLoRA(r=3, target_r=1))), rank=2), detach_norm=False),
]


@pytest.mark.parametrize("spec", NORMALISING, ids=repr)
def test_importance_is_the_derivative_with_gains_held(spec):
    """d/dε of the loss when a number w of the generator becomes (1 + ε) w and every gain stays as it is."""
    layer = perturbed(AdaptedLinear(nn.Linear(7, 5).double(), spec, name="it"))
    layer.adapter.generator.mask[2] = 0
    functional = torch.randn(32, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (layer(X) * functional).sum().backward()
    pull = pull_of_norms(layer).grads
    tree, leaves = tree_of(layer.adapter)
    G = functional.T @ X
    loss = (G * held(layer.weight.detach(), tree)).sum()
    prefix = "inner." * spec.depth
    for name in ("P", "lam", "Q"):
        expected = torch.autograd.grad(loss, leaves[prefix + name], retain_graph=True)[0]
        grad = layer.adapter.generator.values()[name].grad
        actual = grad + pull.get(name, torch.zeros_like(grad))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def held(W, tree):
    """The dense weight of a composition with every norm of an inside a constant."""
    inside = tree["inner"]
    if inside is None:
        return W + adapted(W, tree).update
    below = held(W, inside)
    p, o = tree["params"], tree["options"]
    if tree["kind"] == "MAP":
        update = below - W
        floor = o["floor"] * W.norm()
        return p["alpha"] * W / W.norm() + p["beta"] * update / torch.maximum(update.detach().norm(), floor)
    if tree["kind"] == "DoRA":
        return (p["magnitude"] / below.detach().norm(dim=1))[:, None] * below
    if tree["kind"] == "PreDiag":
        return below + (p["diag"] - 1)[:, None] * W
    E, C = p["D"] - p["C"], p["C"]
    skew, eye = E @ C.T - C @ E.T, torch.eye(len(W), dtype=W.dtype)
    return torch.linalg.solve(eye - skew / 2, eye + skew / 2) @ below


def test_over_map_the_gradient_alone_can_not_tell_two_triplets_apart():
    """Euler: over MAP Σ λ ∂L/∂λ = 0, so of two triplets both have the same |λ ∂L/∂λ|. With gains held they differ."""
    layer = AdaptedLinear(nn.Linear(7, 5).double(), MAP(AdaLoRA(r=2, target_r=1)))
    generator = layer.adapter.generator
    with torch.no_grad():
        generator.P.copy_(torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64))[0])
        generator.Q.copy_(torch.linalg.qr(torch.randn(7, 2, dtype=torch.float64))[0].T)
        generator.lam.copy_(torch.tensor([10.0, 0.1]))
    target = layer.weight + torch.outer(generator.P[:, 0], generator.Q[0]).detach() * 2
    (layer(X) - X @ target.T - layer.bias).square().mean().backward()
    raw = (generator.lam * generator.lam.grad).abs()
    torch.testing.assert_close(raw[0], raw[1])
    kept = (generator.lam * (generator.lam.grad + pull_of_norms(layer).grads["lam"])).abs()
    assert kept[0] > 20 * kept[1]


@pytest.mark.parametrize("spec", [MAP(AdaLoRA(r=3, target_r=1)), MAP(PreDiag(AdaLoRA(r=3, target_r=1)))], ids=repr)
def test_importance_knows_nothing_of_the_length_that_a_wrapper_takes_away(spec):
    """λ → c λ is no other weight over MAP, and no other importance."""
    importances = []
    for c in (1.0, 50.0):
        torch.manual_seed(0)
        layer = perturbed(AdaptedLinear(nn.Linear(7, 5).double(), spec))
        if spec.inner.depth:
            layer.adapter.inner.diag.data.fill_(1)  # else the diagonal is part of the update, and c another direction
        generator = layer.adapter.generator
        generator.lam.data.mul_(c)
        layer(X).sin().sum().backward()
        importances.append((generator.lam * (generator.lam.grad + pull_of_norms(layer).grads["lam"])).abs())
    torch.testing.assert_close(*importances)


def test_importance_is_that_of_the_bare_update_that_makes_the_same_weight():
    """MAP(AdaLoRA) and a bare AdaLoRA with the same W' have the same importance of every triplet."""
    over = perturbed(AdaptedLinear(nn.Linear(7, 5, bias=False).double(), MAP(AdaLoRA(r=3, target_r=1))))
    over.adapter.alpha.data.copy_(over.weight.norm())
    bare = AdaptedLinear(nn.Linear(7, 5, bias=False).double(), AdaLoRA(r=3, target_r=1))
    generator, twin = over.adapter.generator, bare.adapter
    with torch.no_grad():
        bare.weight.copy_(over.weight)
        bare.refresh()
        for name in ("P", "lam", "Q"):
            twin.values()[name].copy_(generator.values()[name])
        update = generator.P @ torch.diag(generator.lam) @ generator.Q
        twin.lam.mul_(over.adapter.beta / update.norm())
    torch.testing.assert_close(over.effective_weight(), bare.effective_weight())
    for layer in (over, bare):
        layer(X).sin().sum().backward()
    pull = pull_of_norms(over).grads
    assert not pull_of_norms(bare).grads
    for name in ("P", "lam", "Q"):
        value, other = generator.values()[name], twin.values()[name]
        torch.testing.assert_close(value * (value.grad + pull[name]), other * other.grad)


def test_a_global_threshold_under_map_keeps_what_the_task_needs():
    """Two layers side by side; only the first has anything to learn. Its triplets stay, whatever the gains are."""
    torch.manual_seed(0)

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.useful, self.idle = nn.Linear(7, 5).double(), nn.Linear(7, 5).double()

        def forward(self, x):
            return self.useful(x) + 1e-3 * self.idle(x)

    for wrap in (lambda g: g, MAP, DoRA):
        model = Sum()
        az.adapt(model, wrap(AdaLoRA(r=4, target_r=2, t_final=20)), seed=1)
        goal = torch.randn(5, 3, dtype=torch.float64) @ torch.randn(3, 7, dtype=torch.float64)
        wanted = model(X).detach() + X @ goal.T
        optimiser = optimiser_of(model, lr=2e-2, weight_decay=0.0)
        az.attach(model, optimiser, total_steps=120)
        for _ in range(120):
            step(model, optimiser, (model(X) - wanted).square().mean())
        kept = az.ranks(model)
        assert kept["useful"] >= 3, (wrap, kept)
        assert sum(kept.values()) == 4


def test_the_share_of_the_penalty_is_what_it_says():
    model = perturbed(model_with(AdaLoRA(r=3, target_r=2, orth_weight=0.4)))
    optimiser = optimiser_of(model, lr=0.0)
    attachment = az.attach(model, optimiser, total_steps=5)
    assert math.isnan(attachment.penalty_share)
    twin = copy.deepcopy(model)
    parts = []
    for loss in (dense_penalty(twin, 0.4), (twin(X) - Y).square().mean()):
        twin.zero_grad()
        loss.backward()
        size = 0.0
        for (_, name), value in named(twin):
            if value.grad is not None:
                importance = (value * value.grad).abs().detach()
                size += float((importance.mean(dim={"P": 0, "Q": 1}[name]) if name != "lam" else importance).sum())
        parts.append(size)
    step(model, optimiser)
    assert attachment.penalty_share == pytest.approx(parts[0] / sum(parts), rel=1e-9)
    assert 0.01 < attachment.penalty_share < 0.99
