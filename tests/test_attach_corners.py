"""Corners of attach, of the budget and of compaction: each of these tests was written for a planted fault."""

import copy
import math

import pytest
import torch
import torch.distributed.fsdp
from test_attach import ADA, OPTIMISERS, Experts, Model, Run, loss_of, same, trained, warned
from test_budget import dense_penalty
from torch import nn

import adapterzoo as az
from adapterzoo import MAP, AdaLoRA, AdaptedLinear, DoRA, LoRA
from adapterzoo.errors import SpecError, TargetError, TrainingError, UnattendedWarning
from adapterzoo.methods.budget import Budget, allocate
from adapterzoo.methods.importance import SENSITIVITY, UNCERTAINTY, scores
from adapterzoo.rules import Member
from adapterzoo.training import attach as attaching
from adapterzoo.training.held import pull_of_norms
from adapterzoo.training.optimisers import plain_optimizer


@pytest.mark.parametrize("field", ["t_init", "t_final", "delta_t", "beta1", "beta2"])
def test_each_field_of_a_schedule_needs_a_target(field):
    value = 0.5 if field.startswith("beta") else 3
    with pytest.raises(SpecError, match=f"{field} without target_r does nothing: the rank stays 4"):
        AdaLoRA(r=4, **{field: value})


def test_smoothing_and_weights_have_their_papers_values_and_ranges():
    spec = AdaLoRA(r=4, target_r=2)
    assert (spec.t_init, spec.t_final, spec.delta_t) == (0, 0, 1)
    assert (spec.beta1, spec.beta2, spec.orth_weight, spec.dropout) == (0.85, 0.85, 0.1, 0.0)
    for beta in ("beta1", "beta2"):
        with pytest.raises(SpecError, match=rf"{beta}=1\.0 is not valid"):
            AdaLoRA(r=4, target_r=2, **{beta: 1.0})


def remembered(dtype=torch.float64, size=1.0):
    draw = torch.Generator().manual_seed(0)
    shapes = {"P": (5, 4), "lam": (4,), "Q": (4, 7)}
    return {
        name: {key: size * torch.rand(shape, generator=draw, dtype=dtype) for key in (SENSITIVITY, UNCERTAINTY)}
        for name, shape in shapes.items()
    }


def member_of(memory, spec=AdaLoRA(r=4, target_r=2), **values):
    return Member("it", spec, {"mask": torch.ones(4), "lam": torch.ones(4), **values}, {}, memory=memory)


def test_the_score_of_a_triplet_is_the_formula_with_or_without_gradients_at_hand():
    memory = remembered()
    product = {name: kept[SENSITIVITY] * kept[UNCERTAINTY] for name, kept in memory.items()}
    both = product["lam"] + product["P"].sum(dim=0) / 5
    torch.testing.assert_close(scores(member_of(memory)), both + product["Q"].sum(dim=1) / 7)
    memory["Q"].clear()  # the optimiser has begun with it, but nothing is known
    torch.testing.assert_close(scores(member_of(memory)), both)


def test_scores_of_tiny_gradients_do_not_vanish():
    """Ī Ū of 1e-30 each is no float32."""
    small, large = (scores(member_of(remembered(torch.float32, size))) for size in (1e-30, 1.0))
    torch.testing.assert_close(small / small.sum(), large / large.sum())


def test_a_score_that_is_not_a_number_is_the_lowest():
    memory = remembered()
    memory["lam"][SENSITIVITY][scores(member_of(memory)).argmax()] = torch.nan
    member = member_of(memory)
    order = scores(member).nan_to_num(nan=-1).argsort(descending=True)
    allocate([member], 3)
    assert member.values["mask"][order].tolist() == [1, 1, 1, 0]


def test_masks_stay_after_the_end_where_fewer_are_left_than_the_budget():
    """As when a finished model goes on under a higher target."""
    memory = remembered()
    best = int(scores(member_of(memory)).argmax())
    mask = torch.zeros(4)
    mask[(best + 1) % 4] = 1
    member = member_of(memory, AdaLoRA(r=4, target_r=3, t_final=2), mask=mask.clone())
    Budget(0, 2, 1).step([member], 9, 10)
    assert member.values["mask"].equal(mask)
    assert member.values["lam"].equal(mask)


def test_the_schedule_is_finished_with_its_last_allocation():
    run = Run(ADA).go(0, 9)
    assert not run.attachment.finished
    with pytest.raises(TrainingError, match="at step 9 of 14"):
        az.compact(run.model)
    run.go(9, 10)  # T − t_final
    assert run.attachment.finished
    assert sum(az.compact(run.model).values()) == 4


def test_a_parameter_without_a_gradient_keeps_its_importance():
    run = Run(ADA).go(0, 3)
    Q = run.model.body[0].adapter.Q
    before = {key: run.optimiser.state[Q][key].clone() for key in (SENSITIVITY, UNCERTAINTY)}
    assert all(value.any() for value in before.values())
    Q.requires_grad_(False)
    run.go(3, 12)
    assert all(run.optimiser.state[Q][key].equal(value) for key, value in before.items())
    assert sum(az.ranks(run.model).values()) == 4


def test_an_earlier_attachment_that_is_detached_once_more_leaves_the_later_one_alone():
    run = Run(ADA)
    earlier = run.attachment
    run.attachment = az.attach(run.model, run.optimiser, total_steps=14)
    earlier.detach()
    run.go(0, 14)  # warnings are errors
    assert sum(az.ranks(run.model).values()) == 4


def test_what_is_frozen_in_an_optimiser_is_not_warned_of():
    model = Model(ADA)
    model.body.requires_grad_(False)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, 0).backward()
    assert not warned(optimiser.step)


def test_a_step_that_is_none_is_not_warned_of():
    model = Model(ADA)
    optimiser = torch.optim.AdamW(trained(model), lr=0.1)
    assert not warned(optimiser.step)
    loss_of(model, 0).backward()
    assert len(warned(optimiser.step)) == 1


def test_magnitudes_may_have_an_optimiser_of_their_own():
    model = Model(MAP(ADA))
    generators = [layer.adapter.generator for layer in az.adapted_layers(model).values()]
    factors = [p for generator in generators for p in generator.parameters()]
    others = [p for p in trained(model) if not any(p is q for q in factors)]
    first, second = torch.optim.AdamW(factors, lr=1e-2), torch.optim.SGD(others, lr=1e-2)
    az.attach(model, first, total_steps=12)
    for t in range(12):
        loss_of(model, t).backward()
        for optimiser in (second, first):
            assert not warned(optimiser.step)
            optimiser.zero_grad()
    assert sum(az.ranks(model).values()) == 4


def test_a_step_with_a_rate_in_one_group_alone_is_a_step():
    model = Model(ADA)
    head = list(model.head.parameters())
    factors = [p for p in trained(model) if not any(p is q for q in head)]
    optimiser = torch.optim.AdamW([{"params": head, "lr": 0.0}, {"params": factors, "lr": 0.1}])
    attachment = az.attach(model, optimiser, total_steps=14)
    for parameter in trained(model):
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    assert attachment.step == 1


def test_a_new_group_in_front_does_not_start_the_count_anew():
    run = Run(ADA).go(0, 3)
    run.optimiser.add_param_group({"params": list(nn.Linear(2, 2).parameters())})
    run.optimiser.param_groups.reverse()
    assert run.attachment.step == 3


def test_the_share_of_a_penalty_that_is_not_added_is_unknown():
    run = Run(ADA, add_penalty=False).go(0, 2)
    assert run.attachment.report["importance"] > 0
    assert math.isnan(run.attachment.penalty_share)


def test_p_and_q_are_drawn_apart():
    layer = AdaptedLinear(nn.Linear(5, 5), AdaLoRA(r=4))
    assert not layer.adapter.P.flatten().equal(layer.adapter.Q.flatten())


def importances(run):
    return [run.optimiser.state[p][SENSITIVITY] for g in generators(run.model) for p in g.parameters()]


def generators(model):
    return [layer.adapter.generator for layer in az.adapted_layers(model).values()]


class Flaky(torch.optim.SGD):
    fails = False

    def step(self, closure=None):
        if self.fails:
            raise OSError("no more")
        return super().step(closure)


def give_up(optimiser):
    optimiser.fails = True
    with pytest.raises(OSError, match="no more"):
        optimiser.step()
    optimiser.fails = False


def test_leaving_the_block_detaches():
    model = Model(ADA)
    optimiser = torch.optim.AdamW(trained(model))
    with az.attach(model, optimiser, total_steps=10):
        assert optimiser._optimizer_step_pre_hooks
    assert not optimiser._optimizer_step_pre_hooks
    assert not optimiser._optimizer_step_post_hooks


def test_gradients_of_a_step_that_was_given_up_count_for_nothing():
    model = Experts()
    az.adapt(model, AdaLoRA(r=4, target_r=2, t_init=10))
    optimiser = Flaky(trained(model), lr=0.1)
    az.attach(model, optimiser, total_steps=14)
    model(torch.ones(3, 7), 1).square().mean().backward()
    give_up(optimiser)
    optimiser.zero_grad()
    model(torch.ones(3, 7), 0).square().mean().backward()
    optimiser.step()
    for parameter in trained(model.experts[1]):
        assert SENSITIVITY not in optimiser.state.get(parameter, {})


@pytest.mark.parametrize("orth_weight", [0.0, 0.5])
@pytest.mark.parametrize("to_none", [True, False])
def test_a_step_that_was_given_up_and_another_after_it(orth_weight, to_none):
    """New gradients are seen as new, in new tensors or in the old ones."""
    ends = []
    for flaky in (True, False):
        model = Model(AdaLoRA(r=4, target_r=2, orth_weight=orth_weight), dropout=0.0)
        optimiser = Flaky(trained(model), lr=0.1)
        az.attach(model, optimiser, total_steps=14)
        for t in range(3):
            if flaky:
                loss_of(model, 50 + t).backward()
                give_up(optimiser)
                optimiser.zero_grad(set_to_none=to_none)
            loss_of(model, t).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=to_none)
        ends.append((dict(model.state_dict()), optimiser.state_dict()["state"]))
    assert same(*ends)


def test_a_step_that_is_none_leaves_gradients_and_moments_at_zero():
    run = Run(AdaLoRA(r=4, target_r=2, orth_weight=0.5))
    for parameter in trained(run.model):
        parameter.grad = torch.zeros_like(parameter)
    for group in run.optimiser.param_groups:
        group["lr"] = 0.0
    run.optimiser.step()
    for parameter in trained(run.model):
        assert not parameter.grad.any()
        assert not run.optimiser.state[parameter]["exp_avg"].any()


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_step_that_is_none_makes_room_for_what_a_checkpoint_brings(kind):
    """Also where the optimiser itself remembers nothing."""
    run = Run(ADA, OPTIMISERS[kind])
    for parameter in trained(run.model):
        parameter.grad = torch.zeros_like(parameter)
    for group in run.optimiser.param_groups:
        group["lr"] = 0.0
    run.optimiser.step()
    assert not any(value.any() for value in importances(run))


def test_an_expert_that_is_not_routed_to_keeps_its_scores():
    """Masks are chosen at a step in which only the other one, which matters less, has gradients."""
    model = Experts()
    az.adapt(model, AdaLoRA(r=4, target_r=2, t_init=6, orth_weight=0))
    optimiser = torch.optim.SGD(trained(model), lr=0.1)
    az.attach(model, optimiser, total_steps=8)
    for t in range(8):
        which = 1 if t < 6 else 0
        ((1.0 if which else 1e-4) * model(torch.ones(3, 7), which)).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert az.ranks(model)["experts.1"] > 2
    assert sum(az.ranks(model).values()) == 4


def test_what_is_thawed_later_and_not_held_is_neither_pulled_nor_remembered():
    model = Model(AdaLoRA(r=4, target_r=2, orth_weight=0.5), dropout=0.0)
    Q = model.body[0].adapter.Q.requires_grad_(False)
    optimiser = torch.optim.AdamW(trained(model), lr=1e-2)
    az.attach(model, optimiser, total_steps=14)
    Q.requires_grad_(True)
    loss_of(model, 0).backward()
    before = Q.grad.clone()
    optimiser.step()
    assert Q.grad.equal(before)
    assert Q not in optimiser.state
    optimiser.state_dict()


def test_a_closures_value_has_the_penalties_that_are_added():
    model = Model(AdaLoRA(r=4, target_r=2, orth_weight=0.5), dropout=0.0)
    optimiser = torch.optim.SGD(trained(model), lr=0.1)
    az.attach(model, optimiser, total_steps=14)
    model.body[3].adapter.requires_grad_(False)
    loss = loss_of(model, 0)
    expected = loss.item() + az.penalty(model.body[0]).item() / 2  # one of two siblings

    def closure():
        loss.backward()
        return loss

    assert optimiser.step(closure).item() == pytest.approx(expected)


@pytest.mark.parametrize("spec", [AdaLoRA(r=4, target_r=2, t_init=9, orth_weight=0.5), MAP(ADA)], ids=repr)
def test_importance_knows_nothing_of_a_scale(spec):
    """Fused optimisers divide by it themselves, inside of their step."""
    plain, scaled = (Run(spec, lambda p: torch.optim.SGD(p, lr=0.3, fused=True)) for _ in range(2))
    for run in (plain, scaled):
        run.model.body[2].p = 0.0
    plain.go(0, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(2):
        scaled.optimiser.zero_grad()
        scaler.scale(loss_of(scaled.model, t)).backward()
        scaler.step(scaled.optimiser)
        scaler.update()
        scaled.schedule.step()
    for a, b in zip(importances(plain), importances(scaled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)
    assert scaled.attachment.penalty_share == pytest.approx(plain.attachment.penalty_share, rel=1e-3)
    assert plain.attachment.penalty_share > 0.01


def test_gradients_stay_the_tensors_that_they_are():
    """They may be views of one buffer, as DistributedDataParallel has them."""
    run = Run(AdaLoRA(r=4, target_r=2, orth_weight=0.5))
    loss_of(run.model, 0).backward()
    before = [p.grad for p in trained(run.model)]
    copies = [grad.clone() for grad in before]
    run.optimiser.step()
    assert all(p.grad is grad for p, grad in zip(trained(run.model), before, strict=True))
    assert any(not grad.equal(old) for grad, old in zip(before, copies, strict=True))


@pytest.mark.parametrize("spec", [ADA, MAP(ADA)], ids=repr)
def test_an_optimiser_that_changes_gradients_in_its_step(spec):
    class Changing(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            super().step()
            for group in self.param_groups:
                torch._foreach_zero_([p.grad for p in group["params"]])

    plain, other = (Run(spec, lambda p, kind=kind: kind(p, lr=0.3)) for kind in (torch.optim.SGD, Changing))
    for run in (plain, other):
        torch.manual_seed(0)
        run.go(0, 14)
    assert same(importances(plain), importances(other))
    assert importances(plain)[0].any()
    assert same(dict(plain.model.state_dict()), dict(other.model.state_dict()))


def test_the_count_outlives_the_first_group():
    model = Model(ADA)
    head = list(model.head.parameters())
    factors = [p for p in trained(model) if not any(p is q for q in head)]
    optimiser = torch.optim.AdamW([{"params": head}, {"params": factors}], lr=0.1)
    attachment = az.attach(model, optimiser, total_steps=14)
    for t in range(3):
        loss_of(model, t).backward()
        optimiser.step()
    del optimiser.param_groups[0]
    assert attachment.step == 3


def two_schedules():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5))
    az.adapt(model, targets={"0": AdaLoRA(r=4, target_r=1), "2": AdaLoRA(r=4, target_r=2, t_final=1)})
    optimiser = torch.optim.AdamW(trained(model), lr=1e-2)
    return model, optimiser, az.attach(model, optimiser, total_steps=8)


def test_what_rules_say_is_summed():
    model, optimiser, attachment = two_schedules()
    for _ in range(8):
        model(torch.ones(2, 7)).square().mean().backward()
        optimiser.step()
        assert attachment.report["budget"] == sum(az.ranks(model).values())
    assert attachment.report["budget"] == 3


@pytest.mark.parametrize("which", [0, 2])
def test_a_schedule_all_of_whose_layers_are_frozen_rests(which):
    model, optimiser, _ = two_schedules()
    model[which].adapter.requires_grad_(False)
    for _ in range(9):
        model(torch.ones(2, 7)).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert az.ranks(model) == ({"0": 4, "2": 2} if which == 0 else {"0": 1, "2": 4})


def test_nothing_is_measured_after_the_end(monkeypatch):
    run = Run(MAP(ADA)).go(0, 10)  # T − t_final
    monkeypatch.setattr(attaching, "pull_of_norms", lambda layer: pytest.fail("measured in vain"))
    run.go(10, 14)
    assert run.attachment.report["importance"] == 0


def test_the_pull_is_measured_under_autocast_as_without():
    pulls = []
    for spec in (DoRA(ADA, detach_norm=False), MAP(DoRA(ADA, detach_norm=False))):
        for autocast in (False, True):
            torch.manual_seed(0)
            layer = AdaptedLinear(nn.Linear(7, 5), spec)
            with torch.no_grad():
                for p in layer.adapter.parameters():
                    p.add_(torch.randn(p.shape) * 0.3)
            layer(torch.randn(8, 7)).square().sum().backward()
            from adapterzoo.training.held import pull_of_norms

            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                pulls.append(pull_of_norms(layer).grads)
        assert same(pulls[-2], pulls[-1])
        assert pulls[-1]


@pytest.mark.parametrize("maximize", [False, True])
def test_an_optimiser_that_changes_gradients_in_its_step2(maximize):
    class Plain(torch.optim.Optimizer):
        def __init__(self, params, clears):
            super().__init__(params, {"lr": 0.1})
            self.clears = clears

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p.grad, alpha=-0.3)
                    p.grad.mul_(0.0 if self.clears else 1.0)

    plain, other = (Run(ADA, lambda p, clears=clears: Plain(p, clears)) for clears in (False, True))
    for run in (plain, other):
        torch.manual_seed(0)
        run.go(0, 14)
    assert same(importances(plain), importances(other))
    assert importances(plain)[0].any()


def test_an_optimiser_in_two_wrappers_is_found():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    plain = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    assert plain_optimizer(Wrapper(Wrapper(plain))) is plain


@pytest.mark.parametrize("orth_weight", [0.0, 0.5])
def test_what_a_closure_may_return(orth_weight):
    """A tensor or a number gets the penalty added, without a graph; nothing stays nothing."""
    spec = AdaLoRA(r=4, target_r=2, orth_weight=orth_weight)
    returned = []
    for give in (lambda loss: loss.detach(), lambda loss: loss.item(), lambda loss: None):
        model = Model(spec, dropout=0.0)
        optimiser = torch.optim.SGD(trained(model), lr=0.1)
        az.attach(model, optimiser, total_steps=14)

        def closure(model=model, give=give):
            loss = loss_of(model, 0)
            loss.backward()
            return give(loss)

        expected = loss_of(model, 0).item() + az.penalty(model).item()
        returned.append(optimiser.step(closure))
        assert returned[-1] is None or float(returned[-1]) == pytest.approx(expected)
    assert returned[2] is None
    assert not returned[0].requires_grad
    assert not getattr(returned[1], "requires_grad", False)


def test_a_step_with_more_arguments_than_a_closure():
    class More(torch.optim.SGD):
        seen = ()

        def step(self, closure, factor=None, power=None):
            self.seen = (factor, power)
            closure()

    model = Model(ADA)
    optimiser = More(trained(model), lr=0.1)
    attachment = az.attach(model, optimiser, total_steps=14)

    def closure():
        loss_of(model, 0).backward()

    optimiser.step(closure, 3, 4)
    assert optimiser.seen == (3, 4)
    optimiser.step(closure=closure, factor=5, power=6)
    assert optimiser.seen == (5, 6)
    assert attachment.step == 2


def test_the_penalty_of_equal_layers_and_of_others_is_the_sum_written_out():
    torch.manual_seed(0)
    model = nn.ModuleList(
        [nn.Linear(7, 5), nn.Linear(7, 5), nn.Linear(7, 5), nn.Linear(9, 5), nn.Linear(7, 6)]
    ).double()
    az.adapt(model, AdaLoRA(r=4, orth_weight=0.7))
    value, expected = az.penalty(model), dense_penalty(model, 0.7)
    torch.testing.assert_close(value, expected)
    factors = [p for layer in model for p in (layer.adapter.P, layer.adapter.Q)]
    for grad, other in zip(torch.autograd.grad(value, factors), torch.autograd.grad(expected, factors), strict=True):
        torch.testing.assert_close(grad, other)


def test_the_penalty_is_computed_in_float32_at_least():
    layer = AdaptedLinear(nn.Linear(40, 30).bfloat16(), AdaLoRA(r=4, orth_weight=0.7), adapter_dtype=torch.bfloat16)
    with torch.no_grad():
        layer.adapter.P.add_(0.3)
    exact = AdaptedLinear(nn.Linear(40, 30).double(), AdaLoRA(r=4, orth_weight=0.7))
    exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = az.penalty(layer)
        assert value.dtype is torch.float32
        torch.testing.assert_close(value.double(), az.penalty(exact), rtol=1e-5, atol=0)


def test_compaction_under_inference_mode_leaves_parameters_that_train():
    run = Run(MAP(ADA)).go(0, 14)
    with torch.inference_mode():
        az.compact(run.model)
    assert not any(p.is_inference() for p in run.model.parameters())
    run.go(14, 16)


def test_compaction_leaves_alone_what_has_nothing_masked():
    model = Model(ADA, dropout=0.0)
    optimiser = torch.optim.LBFGS(trained(model), max_iter=2)

    def closure():
        optimiser.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    assert len(warned(lambda: optimiser.step(closure))) == 1
    pointers = [p.data_ptr() for p in trained(model)]
    az.compact(model, optimiser)
    assert [p.data_ptr() for p in trained(model)] == pointers


def test_an_lbfgs_that_has_not_begun_can_be_given():
    model = Model(ADA)
    model.body[0].adapter.mask[1] = 0
    assert az.compact(model, torch.optim.LBFGS(trained(model)))["body.0"] == 3


def test_an_optimisers_state_may_hold_numbers_and_gets_no_entries_of_buffers():
    run = Run(ADA).go(0, 14)
    for entry in run.optimiser.state.values():
        entry["age"], entry["nothing"] = 3, None
    keys = [id(key) for key in run.optimiser.state]
    az.compact(run.model)
    assert [id(key) for key in run.optimiser.state] == keys
    assert all(entry["age"] == 3 and entry["nothing"] is None for entry in run.optimiser.state.values())
    run.optimiser.state_dict()


def test_a_state_of_the_same_rank_is_loaded_in_place():
    model = Model(MAP(ADA))
    loss_of(model, 0).backward()
    before = [(p.data_ptr(), p.grad) for p in trained(model)]
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    for parameter, (pointer, grad) in zip(trained(model), before, strict=True):
        assert parameter.data_ptr() == pointer
        assert parameter.grad is grad


def test_a_state_without_the_axis_of_ranks_is_torchs_error():
    model = Model(ADA)
    state = model.state_dict()
    state["body.0.adapter.lam"] = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match=r"size mismatch for body\.0\.adapter\.lam|shape of"):
        model.load_state_dict(state)


@pytest.mark.parametrize("wrap", [lambda g: DoRA(g, detach_norm=False), lambda g: MAP(DoRA(g, detach_norm=False))])
def test_the_pull_of_a_zero_row_is_finite(wrap):
    linear = nn.Linear(7, 5)
    with torch.no_grad():
        linear.weight[1] = 0
    layer = AdaptedLinear(linear, wrap(AdaLoRA(r=3, target_r=1)))
    with torch.no_grad():
        layer.adapter.generator.lam.fill_(0.5)
        layer.adapter.generator.P[1] = 0
    layer(torch.randn(8, 7)).square().sum().backward()
    pull = pull_of_norms(layer).grads
    assert pull["lam"].any()
    assert all(torch.isfinite(grad).all() for grad in pull.values())


@pytest.mark.parametrize("scheduled", [True])  # and False once the level follows the stack
def test_the_warning_points_at_the_line_that_steps(scheduled):
    model = Model(ADA)
    optimiser = torch.optim.AdamW(trained(model))
    if scheduled:
        torch.optim.lr_scheduler.LinearLR(optimiser)  # puts a frame of its own around step
    loss_of(model, 0).backward()
    with pytest.warns(UnattendedWarning) as caught:
        optimiser.step()
    assert caught[0].filename == __file__


@pytest.mark.parametrize("spec", [AdaLoRA(r=3, alpha=2, dropout=0.5), LoRA(r=3, alpha=2, dropout=0.5)], ids=repr)
def test_every_low_rank_piece_drops_inputs_in_training_and_on_the_way_in_alone(spec):
    torch.manual_seed(0)
    layer = AdaptedLinear(nn.Linear(6, 4).double(), spec)
    with torch.no_grad():
        for parameter in layer.adapter.parameters():
            parameter.normal_()
    x = torch.ones(1, 6, dtype=torch.float64)
    whole = layer.eval()(x)
    many = layer.train()(x.expand(20000, 6))
    assert not many[0].equal(many[1])
    columns = layer.delta_weight().detach()  # x_j comes twice or not at all
    variance = columns.square().sum(dim=1)
    torch.testing.assert_close(many.mean(dim=0), whole[0], atol=0.1, rtol=0.05)
    torch.testing.assert_close(many.var(dim=0), variance, rtol=0.05, atol=0)


def test_what_keeps_weights_flat_can_not_be_adapted_or_merged(monkeypatch):
    class FullyShardedDataParallel(nn.Sequential):
        """Stands for torch's own, which needs processes."""

    monkeypatch.setattr(torch.distributed.fsdp, "FullyShardedDataParallel", FullyShardedDataParallel)
    with pytest.raises(TargetError, match="in a FullyShardedDataParallel already"):
        az.adapt(FullyShardedDataParallel(nn.Linear(4, 3)), ADA)
    model = Model(ADA)
    with pytest.raises(TargetError, match="FullyShardedDataParallel keeps weights flat"):
        az.merge(FullyShardedDataParallel(model))


def test_compaction_refuses_another_optimiser_than_the_attached_one():
    run = Run(ADA).go(0, 14)
    other = torch.optim.SGD(trained(run.model), lr=0.1)
    with pytest.raises(TrainingError, match="is attached to another optimiser than the given one"):
        az.compact(run.model, other)
    az.compact(run.model, run.optimiser)
    run.go(14, 15)
