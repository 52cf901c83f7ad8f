"""attach, penalty and compact: it can't be forgotten, it resumes bit for bit, and pruning pays."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import adapterzoo as az
from adapterzoo import MAP, SORA, AdaLoRA, AdaptedLinear, DoRA, LoRA, PreDiag
from adapterzoo.errors import MergedError, TargetError, TrainingError, UnattendedWarning

ADA = AdaLoRA(r=4, alpha=6, target_r=2, t_init=2, t_final=4)
SPECS = [ADA, MAP(ADA), DoRA(ADA), MAP(DoRA(ADA)), SORA(PreDiag(ADA), rank=2)]


class Model(nn.Module):
    def __init__(self, spec, dropout=0.1, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Dropout(dropout), nn.Linear(9, 6, bias=False))
        self.head = nn.Linear(6, 5)
        self.to(dtype)
        az.adapt(self, spec, train=["head"], seed=seed)

    def forward(self, x):
        return self.head(self.body(x))


def batch(t, dtype=torch.float32, size=16):
    draw = torch.Generator().manual_seed(1000 + t)
    return torch.randn(size, 7, generator=draw).to(dtype), torch.randn(size, 5, generator=draw).to(dtype)


def loss_of(model, t, part=slice(None)):
    x, y = batch(t, model.head.weight.dtype)
    return (model(x[part]) - y[part]).square().mean()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


OPTIMISERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=2e-2, weight_decay=0.1, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=2e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=2e-2, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=2e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


class Run:
    """A whole training: model, optimiser, schedule, attachment, random state."""

    def __init__(self, spec, optimiser=OPTIMISERS["AdamW"], total=14, **options):
        self.model = Model(spec)
        self.optimiser = optimiser(trained(self.model))
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimiser, 0.1, 1.0, total_iters=total)
        self.attachment = az.attach(self.model, self.optimiser, total_steps=total, **options)

    def go(self, start, stop):
        for t in range(start, stop):
            self.optimiser.zero_grad()
            loss_of(self.model, t).backward()
            self.optimiser.step()
            self.schedule.step()
        return self

    def saved(self):
        file = io.BytesIO()
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "schedule": self.schedule.state_dict(),
                "random": torch.get_rng_state(),
            },
            file,
        )
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        return self


def same(a, b):
    """Equal bit for bit, whatever is inside."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# Resumption.


@pytest.mark.parametrize("stop", [1, 5, 10, 12])
@pytest.mark.parametrize("spec", [*SPECS, MAP(LoRA(r=2))], ids=repr)
def test_resumption_is_exact(spec, stop):
    """Dropout on, a schedule, every part saved: bit for bit what it would have been, the masks included."""
    state = Run(spec).go(0, stop).saved()
    torch.manual_seed(77)
    resumed = Run(spec).load(state).go(stop, 14)
    whole = Run(spec).go(0, 14)
    assert same(whole.saved(), resumed.saved())
    assert resumed.attachment.step == 14
    if spec != MAP(LoRA(r=2)):
        assert sum(az.ranks(resumed.model).values()) == 4


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_resumption_is_exact_with_every_optimiser(kind):
    state = Run(MAP(ADA), OPTIMISERS[kind]).go(0, 6).saved()
    resumed = Run(MAP(ADA), OPTIMISERS[kind]).load(state).go(6, 14)
    assert same(Run(MAP(ADA), OPTIMISERS[kind]).go(0, 14).saved(), resumed.saved())
    assert sum(az.ranks(resumed.model).values()) == 4


def test_without_what_the_optimiser_remembers_a_resumed_run_is_another():
    """That is: the test above would see an allocator that is not saved."""
    state = Run(MAP(ADA)).go(0, 6).saved()
    for entry in state["optimiser"]["state"].values():
        for key in [key for key in entry if key.startswith("adapterzoo")]:
            del entry[key]
    assert not same(Run(MAP(ADA)).go(0, 14).saved(), Run(MAP(ADA)).load(state).go(6, 14).saved())


def test_attaching_after_loading_is_the_same():
    state = Run(ADA).go(0, 6).saved()
    resumed = Run(ADA)
    resumed.attachment.detach()
    resumed.load(state)
    resumed.attachment = az.attach(resumed.model, resumed.optimiser, total_steps=14)
    again = resumed.go(6, 14).saved()
    assert same(Run(ADA).go(0, 14).saved(), again)


@pytest.mark.parametrize("total", [7, 8, 11, 30])
def test_going_on_with_another_number_of_steps_never_brings_ranks_back_and_ends_on_the_target(total):
    state = Run(ADA).go(0, 4).saved()  # of 14
    resumed = Run(ADA, total=total).load(state)
    before = sum(az.ranks(resumed.model).values())
    assert before == 5
    for t in range(4, total):
        resumed.go(t, t + 1)
        now = sum(az.ranks(resumed.model).values())
        assert now <= before
        before = now
    assert before == 4


def test_a_new_optimiser_leaves_final_ranks_as_they_are():
    run = Run(ADA).go(0, 14)
    ranks = az.ranks(run.model)
    optimiser = torch.optim.AdamW(trained(run.model), lr=1e-2)
    run.attachment.detach()
    az.attach(run.model, optimiser, total_steps=14)
    for t in range(14):
        optimiser.zero_grad()
        loss_of(run.model, t).backward()
        optimiser.step()
        assert sum(az.ranks(run.model).values()) == 4
    assert len(ranks) == 2


# Closures, loss scales, accumulation, steps that are none.


def test_a_closure_is_the_same_as_gradients_that_are_there_already():
    plain = Run(MAP(ADA)).go(0, 14)
    closed = Run(MAP(ADA))
    for t in range(14):

        def closure(t=t):
            closed.optimiser.zero_grad()
            loss = loss_of(closed.model, t)
            loss.backward()
            return loss

        closed.optimiser.step(closure) if t % 2 else closed.optimiser.step(closure=closure)
        closed.schedule.step()
    assert same(plain.saved(), closed.saved())


def test_lbfgs_minimises_loss_and_penalty_together():
    model = Model(AdaLoRA(r=3, target_r=2, orth_weight=2.0, t_final=1), dropout=0.0)
    optimiser = torch.optim.LBFGS(trained(model), lr=0.5, max_iter=6, line_search_fn="strong_wolfe")
    az.attach(model, optimiser, total_steps=4)
    seen = []

    def closure():
        optimiser.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        seen.append((loss.item(), az.penalty(model).item()))
        return loss

    first = optimiser.step(closure)
    assert first.item() == pytest.approx(sum(seen[0]))
    for _ in range(3):
        optimiser.step(closure)
    assert sum(seen[-1]) < 0.7 * sum(seen[0])
    assert sum(az.ranks(model).values()) == 4


@pytest.mark.parametrize("kind", ["AdamW foreach", "AdamW fused"])
def test_a_gradient_scaler_changes_nothing(kind):
    """Fused optimisers divide by the scale themselves, inside of their step; skipped steps are no steps."""
    plain = Run(MAP(ADA), OPTIMISERS[kind]).go(0, 14)
    scaled = Run(MAP(ADA), OPTIMISERS[kind])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5)
    for t in range(14):
        if t in (0, 7):  # a step that overflows, and is skipped
            (loss_of(scaled.model.eval(), t) * float("inf")).backward()
            skipped(scaler, scaled)
            scaled.model.train()
        scaler.scale(loss_of(scaled.model, t)).backward()
        scaler.step(scaled.optimiser)
        scaler.update()
        scaled.optimiser.zero_grad()
        scaled.schedule.step()
    assert scaled.attachment.step == 14
    assert az.ranks(plain.model) == az.ranks(scaled.model)
    for (name, value), other in zip(plain.model.state_dict().items(), scaled.model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=2e-3, atol=1e-5, msg=name)


def skipped(scaler, run):
    before = copy.deepcopy(run.model.state_dict())
    step = run.attachment.step
    scaler.scale(torch.zeros((), requires_grad=True)).backward()
    scaler.step(run.optimiser)
    scaler.update(1024.0)
    run.optimiser.zero_grad()
    assert same(before, dict(run.model.state_dict()))
    assert run.attachment.step == step


def test_accumulated_gradients_are_one_step():
    """Halves of a batch, backward each, one step: the same masks and the same penalty, counted once."""
    spec = MAP(AdaLoRA(r=4, target_r=2, orth_weight=0.7))
    runs = []
    for halves in (1, 2):
        torch.manual_seed(0)
        model = Model(spec, dropout=0.0, dtype=torch.float64)
        optimiser = torch.optim.AdamW(trained(model), lr=1e-2)
        az.attach(model, optimiser, total_steps=8)
        for t in range(8):
            for i in range(halves):
                (loss_of(model, t, slice(i, None, halves)) / halves).backward()
            nn.utils.clip_grad_norm_(trained(model), 1.0)
            optimiser.step()
            optimiser.zero_grad()
        runs.append(model)
    assert az.ranks(runs[0]) == az.ranks(runs[1])
    for value, other in zip(runs[0].state_dict().values(), runs[1].state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-7, atol=1e-9)


def test_a_step_with_no_rate_and_no_gradient_is_none():
    """torch.distributed.checkpoint takes one to make an optimiser's state; a warm-up that starts at 0 is a step."""
    run = Run(ADA)
    for parameter in trained(run.model):
        parameter.grad = torch.zeros_like(parameter)
    for group in run.optimiser.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(run.model.state_dict())
    run.optimiser.step()
    assert run.attachment.step == 0
    assert same(before, dict(run.model.state_dict()))
    loss_of(run.model, 0).backward()
    run.optimiser.step()
    assert run.attachment.step == 1


def test_a_step_without_any_gradient_is_none():
    """Lightning takes one where `training_step` returns None."""
    run = Run(ADA)
    before = copy.deepcopy(run.model.state_dict())
    for _ in range(14):
        run.optimiser.step()
    assert run.attachment.step == 0
    assert same(before, dict(run.model.state_dict()))


# The penalty.


def test_the_penalty_added_by_attach_is_the_penalty_in_the_loss():
    for spec in (AdaLoRA(r=4, target_r=2, orth_weight=0.5), DoRA(AdaLoRA(r=4, orth_weight=0.5))):
        runs = []
        for added in (True, False):
            model = Model(spec, dropout=0.0, dtype=torch.float64)
            optimiser = torch.optim.AdamW(trained(model), lr=1e-2)
            attachment = az.attach(model, optimiser, total_steps=6, add_penalty=added)
            for t in range(6):
                optimiser.zero_grad()
                loss = loss_of(model, t)
                (loss if added else loss + az.penalty(model)).backward()
                optimiser.step()
            if spec == AdaLoRA(r=4, target_r=2, orth_weight=0.5):
                assert (attachment.penalty_share > 0) is added  # not known where the loop adds it: NaN
            runs.append(model)
        for value, other in zip(runs[0].state_dict().values(), runs[1].state_dict().values(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11)


def test_a_penalty_that_would_count_twice_is_an_error():
    run = Run(ADA)
    value = az.penalty(run.model)  # to look at it is fine
    with torch.no_grad():
        assert az.penalty(run.model) == value.detach()
    with pytest.raises(TrainingError, match=r"would count twice.*add_penalty=False"):
        (loss_of(run.model, 0) + value).backward()
    run.attachment.detach()
    az.penalty(run.model).backward()


def test_the_penalty_is_zero_where_none_is_declared():
    for spec in (LoRA(r=2), AdaLoRA(r=2, orth_weight=0)):
        assert az.penalty(Model(spec)) == 0
    assert az.penalty(nn.Linear(3, 3)) == 0
    layer = AdaptedLinear(nn.Linear(5, 5), AdaLoRA(r=2))
    with torch.no_grad():
        for factor in (layer.adapter.P, layer.adapter.Q):
            factor.copy_(torch.eye(*factor.shape))
    value = az.penalty(layer)
    value.backward()
    assert value == 0
    assert not layer.adapter.P.grad.any()  # no NaN where the norm is zero


def test_a_frozen_piece_is_not_pulled():
    run = Run(AdaLoRA(r=3, orth_weight=1.0))
    for parameter in run.model.body[0].adapter.parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(run.model.body[0].state_dict())
    run.go(0, 3)
    assert same(before, dict(run.model.body[0].state_dict()))


# It can't be forgotten.


def test_training_without_attach_warns_once_by_name():
    model = Model(MAP(ADA))
    optimiser = torch.optim.AdamW(trained(model))
    loss_of(model, 0).backward()
    with pytest.warns(UnattendedWarning) as caught:
        optimiser.step()
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "layer 'body.0': MAP(AdaLoRA(r=4, alpha=6, target_r=2, t_init=2, t_final=4))" in text
    assert "layer 'body.3'" in text
    assert "adapterzoo.attach(model, optimizer, total_steps=...)" in text
    optimiser.step()  # warnings are errors here


@pytest.mark.parametrize("spec", [AdaLoRA(r=4), AdaLoRA(r=4, orth_weight=0.5), LoRA(r=2)], ids=repr)
def test_a_fixed_rank_needs_nothing_and_never_warns(spec):
    model = Model(spec)
    optimiser = torch.optim.AdamW(trained(model))
    loss_of(model, 0).backward()
    optimiser.step()
    Run(spec).go(0, 2)


def test_an_optimiser_of_something_else_is_not_warned_of():
    model = Model(ADA)
    other = nn.Linear(2, 2)
    optimiser = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(2)).sum().backward()
    optimiser.step()
    torch.optim.SGD(model.head.parameters(), lr=0.1).step()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_is_not_attached(duplicate):
    run = Run(ADA).go(0, 1)
    twin = duplicate(run.model)
    optimiser = torch.optim.AdamW(trained(twin))
    loss_of(twin, 0).backward()
    with pytest.warns(UnattendedWarning):
        optimiser.step()
    run.go(1, 2)


def test_nothing_is_kept_alive():
    run = Run(ADA).go(0, 2)
    layer = run.model.body[0]
    alive = weakref.ref(layer)
    del run, layer
    gc.collect()
    assert alive() is None


def test_what_can_not_be_attached_is_said_all_at_once():
    model = Model(ADA)
    with pytest.raises(TrainingError, match=r"body\.0.*\(P, lam, Q\).*(?s:.*)body\.3.*param_groups"):
        az.attach(model, torch.optim.SGD(model.head.parameters(), lr=0.1), total_steps=10)
    optimiser = torch.optim.AdamW(trained(model))
    for bad in (0, -1, 2.0, True, None, "100"):
        with pytest.raises(TrainingError, match=r"total_steps=.*whole number ≥ 1"):
            az.attach(model, optimiser, total_steps=bad)
    with pytest.raises(TrainingError, match=r"torch\.optim\.Optimizer is needed.*got list"):
        az.attach(model, trained(model), total_steps=10)
    with pytest.raises(TrainingError, match="no adapted layer"):
        az.attach(nn.Linear(2, 2), optimiser, total_steps=10)
    with pytest.raises(TrainingError, match="every adapter of this Model is frozen"):
        az.attach(Model(ADA).requires_grad_(False), optimiser, total_steps=10)
    az.merge(model)
    with pytest.raises(TrainingError, match="merged and can't be trained"):
        az.attach(model, optimiser, total_steps=10)
    az.unmerge(model)
    with az.attach(model, optimiser, total_steps=10) as attachment:
        assert attachment.step == 0
    attachment = az.attach(model, optimiser, total_steps=10)
    with pytest.raises(TrainingError, match=r"attached already, to .* not in this model \(body\.0, body\.3"):
        az.attach(Model(ADA), optimiser, total_steps=10)
    attachment.detach()


def test_an_optimiser_that_can_not_be_saved_with_what_is_remembered_is_refused():
    class Sharding(torch.optim.SGD):
        def consolidate_state_dict(self):
            """As torch's ZeroRedundancyOptimizer has it."""

    model = Model(ADA)
    with pytest.raises(TrainingError, match="a Sharding keeps its state in an optimiser of its own"):
        az.attach(model, Sharding(trained(model), lr=0.1), total_steps=10)


def test_a_later_attachment_takes_the_place_of_an_earlier_one():
    """A cell of a notebook that is run twice; a callback beside a call."""
    once = Run(MAP(ADA)).go(0, 14).saved()
    torch.manual_seed(0)
    twice = Run(MAP(ADA))
    az.attach(twice.model, twice.optimiser, total_steps=14)
    assert same(once, twice.go(0, 14).saved())
    other = torch.optim.AdamW(trained(twice.model), lr=1e-3)
    az.attach(twice.model, other, total_steps=14)
    assert not twice.optimiser._optimizer_step_pre_hooks


def test_detaching_takes_every_hook_off():
    run = Run(ADA)
    run.attachment.detach()
    before = copy.deepcopy([g.mask for g in (run.model.body[0].adapter, run.model.body[3].adapter)])
    with pytest.warns(UnattendedWarning):  # before the end, nobody attends
        run.go(0, 1)
    run.go(1, 12)
    assert run.attachment.step == 0
    assert same(before, [run.model.body[0].adapter.mask, run.model.body[3].adapter.mask])
    assert not run.optimiser._optimizer_step_pre_hooks
    assert not run.optimiser._optimizer_step_post_hooks


def test_a_model_that_needs_nothing_may_be_attached():
    plain, attached = Model(MAP(LoRA(r=2))), Model(MAP(LoRA(r=2)))
    for model in (plain, attached):
        torch.manual_seed(1)
        optimiser = torch.optim.AdamW(trained(model), lr=1e-2)
        if model is attached:
            attachment = az.attach(model, optimiser, total_steps=3)
        for t in range(3):
            optimiser.zero_grad()
            loss_of(model, t).backward()
            optimiser.step()
    assert same(dict(plain.state_dict()), dict(attached.state_dict()))
    assert attachment.step == 3
    assert attachment.finished


def warned(step):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    return [item for item in caught if issubclass(item.category, UnattendedWarning)]


def test_another_optimiser_than_the_attached_one_is_warned_of():
    run = Run(ADA)
    other = torch.optim.SGD(trained(run.model), lr=0.1)
    loss_of(run.model, 0).backward()
    assert not warned(run.optimiser.step)
    assert len(warned(other.step)) == 1
    assert not warned(other.step)


def test_an_optimiser_around_the_attached_one_is_fine_and_one_around_another_is_not():
    class Around(torch.optim.Optimizer):
        def __init__(self, base):
            super().__init__(base.param_groups, {})
            self.base, self.param_groups, self.state = base, base.param_groups, base.state

        def step(self, closure=None):
            return self.base.step(closure)

    for attach_outer in (True, False):
        model = Model(ADA)
        base = torch.optim.AdamW(trained(model), lr=1e-2)
        outer = Around(base)
        attachment = az.attach(model, outer if attach_outer else base, total_steps=14)
        loss_of(model, 0).backward()
        assert not warned(outer.step)
        assert attachment.step == 1


def test_training_goes_on_after_all_is_done_and_nobody_warns():
    run = Run(ADA).go(0, 14)
    run.attachment.detach()
    run.go(14, 16)


# Parts that are frozen, asleep, or not held.


@pytest.mark.parametrize("spec", [ADA, MAP(ADA)], ids=repr)
def test_a_frozen_adapter_is_left_as_it_is(spec):
    """Its triplets are not pruned for want of a gradient, and the budget is that of the others."""
    run = Run(spec)
    frozen = run.model.body[3].adapter.generator
    with torch.no_grad():
        frozen.lam.fill_(1.0)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(frozen.state_dict())
    run.go(0, 14)
    assert same(before, dict(frozen.state_dict()))
    assert az.ranks(run.model) == {"body.0": 2, "body.3": 4}


def test_what_the_optimiser_does_not_hold_is_left_alone():
    model = Model(ADA)
    frozen = model.body[3].adapter
    frozen.requires_grad_(False)
    optimiser = torch.optim.AdamW(trained(model), lr=1e-2)
    az.attach(model, optimiser, total_steps=14)
    frozen.requires_grad_(True)
    before = copy.deepcopy(frozen.P)
    loss_of(model, 0).backward()
    optimiser.step()
    optimiser.state_dict()
    assert before.equal(frozen.P)


def test_a_step_of_the_head_alone_is_a_step():
    run = Run(AdaLoRA(r=4, target_r=2, t_init=1))
    before = copy.deepcopy(run.model.body.state_dict())
    run.model.head(torch.ones(3, 6)).square().mean().backward()
    run.optimiser.step()
    assert run.attachment.step == 1
    assert same(before, run.model.body.state_dict())


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(7, 5) for _ in range(2))

    def forward(self, x, which):
        return self.experts[which](x)


def test_an_expert_without_a_gradient_keeps_its_numbers():
    model = Experts()
    az.adapt(model, AdaLoRA(r=4, target_r=2, t_init=10))
    optimiser = torch.optim.AdamW(trained(model), lr=1e-2)
    az.attach(model, optimiser, total_steps=14)
    for t in range(2):
        model(torch.ones(3, 7), t % 2).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    own = {name: p for name, p in model.experts[1].named_parameters() if p.requires_grad}
    state = copy.deepcopy({name: (p, optimiser.state[p]) for name, p in own.items()})
    model(torch.ones(3, 7), 0).square().mean().backward()
    optimiser.step()
    for name, parameter in own.items():
        assert same(state[name][0].data, parameter.data)
        assert same(dict(state[name][1]), dict(optimiser.state[parameter]))


@pytest.mark.parametrize("how", ["frozen", "stages"])
def test_a_magnitude_without_a_gradient_is_said(how):
    run = Run(MAP(ADA))
    if how == "frozen":
        run.model.body[0].adapter.beta.requires_grad_(False)
    else:
        az.stages(run.model, run.optimiser, steps=2)
    with pytest.warns(az.errors.ImportanceWarning, match=r"'body\.0': beta of MAP got no gradient") as caught:
        run.go(0, 4)
    assert len(caught) == 1


# Steps inside of steps, and steps that fail.


def test_a_step_inside_of_a_step_is_one():
    class Mine(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    options = {"lr": 2e-2, "weight_decay": 0.1, "foreach": False}
    mine = Run(MAP(ADA), lambda p: Mine(p, **options)).go(0, 14)
    plain = Run(MAP(ADA), lambda p: torch.optim.AdamW(p, **options)).go(0, 14)
    assert same(plain.saved(), mine.saved())
    assert mine.attachment.step == 14


def test_a_step_that_failed_and_is_tried_again_has_its_penalty_once():
    class Flaky(torch.optim.SGD):
        fails = True

        def step(self, closure=None):
            if self.fails:
                raise OSError("no more")
            return super().step(closure)

    ends = []
    for flaky in (True, False):
        model = Model(ADA, dropout=0.0)
        optimiser = Flaky(trained(model), lr=0.1)
        attachment = az.attach(model, optimiser, total_steps=14)
        for t in range(2):
            optimiser.zero_grad()
            loss_of(model, t).backward()
            optimiser.fails = flaky
            if flaky:
                with pytest.raises(OSError, match="no more"):
                    optimiser.step()
            optimiser.fails = False
            optimiser.step()
        assert attachment.step == 2
        ends.append(dict(model.state_dict()))
    assert same(*ends)


def test_a_step_that_failed_and_is_given_up_leaves_nothing_behind():
    run = Run(ADA)
    plain = Run(ADA)
    original = run.optimiser.__class__.step
    loss_of(run.model.eval(), 3).backward()
    handle = run.optimiser.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.optimiser.step()
    handle.remove()
    assert run.optimiser.__class__.step is original
    run.model.train()
    torch.manual_seed(0)
    run.go(0, 3)
    torch.manual_seed(0)
    assert same(plain.go(0, 3).saved(), run.saved())


def test_steps_are_counted_though_groups_come_and_go():
    run = Run(ADA)
    run.go(0, 3)
    extra = nn.Linear(2, 2)
    run.optimiser.add_param_group({"params": list(extra.parameters())})
    run.schedule.base_lrs.append(0.01)
    run.go(3, 5)
    run.optimiser.param_groups.reverse()
    assert run.attachment.step == 5


def test_a_step_under_autocast_does_the_same():
    plain = Run(MAP(ADA)).go(0, 6)
    other = Run(MAP(ADA))
    for t in range(6):
        other.optimiser.zero_grad()
        loss_of(other.model, t).backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            other.optimiser.step()
        other.schedule.step()
    assert same(plain.saved(), other.saved())


@pytest.mark.parametrize("spec", [MAP(DoRA(ADA)), DoRA(ADA, detach_norm=False)], ids=repr)
def test_a_float64_model_with_a_float32_adapter(spec):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 5)).double()
    az.adapt(model, spec, adapter_dtype=torch.float32)
    optimiser = torch.optim.AdamW(trained(model), lr=1e-2)
    az.attach(model, optimiser, total_steps=8)
    for _ in range(8):
        model(torch.randn(4, 7, dtype=torch.float64)).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert sum(az.ranks(model).values()) == 4
    assert model[0].adapter.generator.P.dtype is torch.float32


# torch's distributed checkpoints, which fill what is there.


def test_a_distributed_checkpoint_holds_what_is_remembered(tmp_path):
    whole = Run(MAP(ADA)).go(0, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about a single process
        model, optimiser = get_state_dict(whole.model, whole.optimiser)
        dcp.save({"model": model, "optimiser": optimiser}, checkpoint_id=tmp_path)
        resumed = Run(MAP(ADA))
        model, optimiser = get_state_dict(resumed.model, resumed.optimiser)
        state = {"model": model, "optimiser": optimiser}
        dcp.load(state, checkpoint_id=tmp_path)
        set_state_dict(
            resumed.model, resumed.optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"]
        )
    assert resumed.attachment.step == 6
    resumed.schedule.load_state_dict(whole.schedule.state_dict())
    random = torch.get_rng_state()
    whole.go(6, 14)
    torch.set_rng_state(random)
    resumed.go(6, 14)
    assert same(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    for parameter, other in zip(trained(whole.model), trained(resumed.model), strict=True):
        mine, theirs = whole.optimiser.state[parameter], resumed.optimiser.state[other]
        assert mine.keys() == theirs.keys()
        assert all(same(mine[key], theirs[key]) for key in mine)


# Taking masked ranks away.


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_compaction_changes_no_output_and_training_goes_on(spec):
    """Compacted and only masked, the same further steps: the same model, to round-off."""
    masked = Run(spec).go(0, 11)
    masked.model.body[2].p = 0.0
    compacted = Run(spec).load(masked.saved())
    compacted.model.body[2].p = 0.0
    sizes = sum(p.numel() for p in trained(compacted.model))
    left = az.compact(compacted.model)
    assert left == az.ranks(masked.model)
    assert sum(left.values()) == 4
    removed = sum((4 - left[name]) * (layer.in_features + layer.out_features + 1)
                  for name, layer in az.adapted_layers(compacted.model).items())  # fmt: skip
    assert sum(p.numel() for p in trained(compacted.model)) == sizes - removed
    x, _ = batch(0)
    torch.testing.assert_close(compacted.model(x), masked.model(x), rtol=1e-6, atol=1e-6)
    for run in (masked, compacted):  # the penalty sees masked columns, so that they may return; it is left out here
        run.attachment.detach()
    no_penalty = {"add_penalty": False}
    for run in (masked, compacted):
        run.attachment = az.attach(run.model, run.optimiser, total_steps=14, **no_penalty)
        run.go(11, 16)
    torch.testing.assert_close(compacted.model(x), masked.model(x), rtol=1e-5, atol=1e-5)
    assert {tuple(p.shape) for p in trained(compacted.model)} == {
        tuple(p.shape) for group in compacted.optimiser.param_groups for p in group["params"]
    }


def test_a_compacted_state_loads_into_a_whole_model_and_back():
    run = Run(MAP(ADA)).go(0, 14)
    whole = copy.deepcopy(run.model.state_dict())
    az.compact(run.model)
    run.attachment.detach()
    x, _ = batch(0)
    expected = run.model.eval()(x)
    fresh = Model(MAP(ADA)).eval()
    before = [id(p) for p in trained(fresh)]
    fresh.load_state_dict(run.model.state_dict())
    assert fresh(x).equal(expected)
    assert [id(p) for p in trained(fresh)] == before  # an optimiser that was built before has them
    optimiser = torch.optim.AdamW(trained(fresh))
    loss_of(fresh, 0).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnattendedWarning)
        optimiser.step()
    run.model.load_state_dict(whole)
    assert run.model.body[0].adapter.inner.P.shape[1] == 4
    torch.testing.assert_close(run.model(x), expected)
    az.compact(run.model)
    az.reset_adapters(run.model)
    assert same(dict(run.model.body.state_dict()), dict(Model(MAP(ADA)).body.state_dict()))


def test_a_state_of_no_fitting_rank_is_an_error():
    model = Model(ADA)
    state = Model(AdaLoRA(r=5)).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for body\.0\.adapter\.P"):
        model.load_state_dict(state)
    state = Run(ADA).go(0, 14).model.state_dict()
    state["body.0.adapter.lam"] = state["body.0.adapter.lam"][:2]
    with pytest.raises(RuntimeError, match=r"size mismatch for body\.0\.adapter\.lam"):
        model.load_state_dict(state)
    assert model.body[0].adapter.P.shape == (9, 4)


def test_what_can_not_be_compacted():
    with pytest.raises(TargetError, match="no adapted layer"):
        az.compact(nn.Linear(2, 2))
    run = Run(ADA).go(0, 5)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(TrainingError, match=r"'body\.0': ranks may still come and go, at step 5 of 14"):
        az.compact(run.model)
    run.go(5, 14)
    az.merge(run.model)
    with pytest.raises(MergedError, match="unmerge before compacting"):
        az.compact(run.model)
    az.unmerge(run.model)
    for entry in run.optimiser.state.values():
        entry["factored"] = torch.ones(3)
    with pytest.raises(TrainingError, match=r"'factored' in the .* has shape \[3\] .* no one can tell how to cut it"):
        az.compact(run.model)
    assert [v.shape for v in before.values()] == [v.shape for v in run.model.state_dict().values()]
    assert az.compact(Model(LoRA(r=2))) == {}


def test_a_fresh_model_has_nothing_to_take_away():
    model = Model(MAP(AdaLoRA(r=3)))
    ids = [id(p) for p in model.parameters()]
    assert az.compact(model) == {"body.0": 3, "body.3": 3} == az.ranks(model)
    assert [id(p) for p in model.parameters()] == ids


def test_compaction_keeps_the_parameters_that_optimisers_hold():
    run = Run(MAP(ADA)).go(0, 14)
    before = [id(p) for p in trained(run.model)]
    loss = loss_of(run.model, 0)  # alive while the shapes change, as the last loss of a loop is
    loss.backward()
    gradient = run.model.body[0].adapter.inner.lam.grad.clone()
    kept = run.model.body[0].adapter.inner.mask != 0
    az.compact(run.model)
    assert [id(p) for p in trained(run.model)] == before
    assert run.model.body[0].adapter.inner.lam.grad.equal(gradient[kept])
    run.go(14, 16)
    for parameter in trained(run.model):
        assert run.optimiser.state[parameter]["exp_avg"].shape == parameter.shape == parameter.grad.shape
    assert loss.item() > 0


def test_compaction_with_an_optimiser_that_is_given():
    run = Run(ADA).go(0, 14)
    run.attachment.detach()
    other = torch.optim.SGD(run.model.head.parameters(), lr=0.1)
    with pytest.raises(TrainingError, match=r"body\..*is not held by the optimiser that was given"):
        az.compact(run.model, other)
    az.compact(run.model, run.optimiser)
    run.go(14, 15)


def test_one_memory_for_all_parameters_can_not_be_cut():
    model = Model(ADA, dropout=0.0)
    model.body[0].adapter.mask[1] = 0
    optimiser = torch.optim.LBFGS(trained(model), max_iter=2)

    def closure():
        optimiser.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnattendedWarning)
        optimiser.step(closure)
    with pytest.raises(TrainingError, match="L-BFGS has one memory for all parameters"):
        az.compact(model, optimiser)


def test_a_rank_of_one_that_goes():
    model = Model(AdaLoRA(r=1))
    optimiser = torch.optim.AdamW(trained(model), lr=1e-2)
    loss_of(model, 0).backward()
    optimiser.step()
    model.body[0].adapter.mask.zero_()
    assert az.compact(model, optimiser) == {"body.0": 0, "body.3": 1}
    optimiser.zero_grad()
    loss_of(model, 1).backward()
    optimiser.step()


def test_a_state_of_another_rank_loads_while_an_earlier_loss_is_alive():
    run = Run(ADA).go(0, 14)
    run.attachment.detach()
    whole = copy.deepcopy(run.model.state_dict())
    az.compact(run.model)
    small = copy.deepcopy(run.model.state_dict())
    for state in (whole, small, whole):
        loss = loss_of(run.model.eval(), 0)
        loss.backward()
        run.model.load_state_dict(state)
        run.model.zero_grad()
        again = loss_of(run.model, 0)
        again.backward()
        fresh = Model(ADA).eval()
        fresh.load_state_dict(state)
        loss_of(fresh, 0).backward()
        for parameter, other in zip(trained(run.model), trained(fresh), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad)
        del loss, again


@pytest.mark.parametrize("scheduled", [False, True])
def test_the_warning_points_at_the_users_own_line(scheduled):
    model = Model(ADA)
    optimiser = torch.optim.AdamW(trained(model), lr=1e-3)
    if scheduled:  # which wraps the optimiser's step in one more function
        torch.optim.lr_scheduler.LinearLR(optimiser)
    loss_of(model, 0).backward()
    with pytest.warns(UnattendedWarning) as caught:
        optimiser.step()
    assert [item.filename for item in caught] == [__file__]
