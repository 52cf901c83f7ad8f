"""Stages: what sleeps stays as it is bit for bit, resumption is exact, and steps are counted as they are taken."""

import copy
import gc
import itertools
import math
import weakref

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adapterzoo import MAP, SORA, AdaLoRA, DoRA, FLoRA, LoRA, adapt, attach, param_groups, stages
from adapterzoo.errors import MergedError, TrainingError
from adapterzoo.training.stages import Schedule

SPEC = MAP(DoRA(LoRA(r=2, alpha=6)))
MAGNITUDES, DIRECTIONS = {"alpha", "beta", "magnitude"}, {"A", "B"}


def build(spec=SPEC, seed=0):
    """A model with two adapted layers and a head that trains; every number that trains away from its start."""
    torch.manual_seed(seed)
    layers = [nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)]
    model = nn.Sequential(*layers).double()
    adapt(model, spec, ["0", "2"], train=["4"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def adamw(model):
    return torch.optim.AdamW(param_groups(model, 0.01, weight_decay=0.1, magnitude_weight_decay=0.1))


def batch(index):
    gen = torch.Generator().manual_seed(index)
    return torch.randn(7, 8, generator=gen, dtype=torch.float64)


def backward(model, index=0):
    loss = model(batch(index)).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, begin, end):
    for index in range(begin, end):
        optimizer.zero_grad()
        backward(model, index)
        optimizer.step()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before):
    """The last names of what has changed; of the head, "head"."""
    changed = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    return {"head" if name.startswith("4.") else name.rsplit(".", 1)[1] for name in changed}


def numbers(optimizer):
    """An optimiser's state, in a form that compares by value."""
    state = optimizer.state_dict()["state"]
    return {(k, n): v.tolist() if isinstance(v, torch.Tensor) else v for k, s in state.items() for n, v in s.items()}


def same(left, right):
    return all(p.equal(q) for p, q in zip(left.parameters(), right.parameters(), strict=True))


OPTIMISERS = {
    "AdamW": adamw,
    "fused AdamW": lambda model: torch.optim.AdamW(param_groups(model, 0.01, weight_decay=0.1), fused=True),
    "foreach AdamW": lambda model: torch.optim.AdamW(param_groups(model, 0.01, weight_decay=0.1), foreach=True),
    "SGD": lambda model: torch.optim.SGD(param_groups(model, 0.01, weight_decay=0.1), momentum=0.9),
    "RMSprop": lambda model: torch.optim.RMSprop(param_groups(model, 0.01, weight_decay=0.1), momentum=0.5),
    "Adafactor": lambda model: torch.optim.Adafactor(param_groups(model, 0.01, weight_decay=0.1)),
}


@pytest.mark.parametrize("cycle", [True, False])
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_what_sleeps_stays_as_it_is_bit_for_bit(kind, cycle):
    model = build()
    optimizer = OPTIMISERS[kind](model)
    turns = stages(model, optimizer, steps=(2, 3), cycle=cycle)
    plan = ["direction"] * 2 + ["magnitude"] * 3 + (["direction"] * 2 + ["magnitude"] if cycle else ["magnitude"] * 3)
    for step, stage in enumerate(plan):
        assert (turns.step, turns.stage) == (step, stage)
        before, state = values(model), numbers(optimizer)
        train(model, optimizer, step, step + 1)
        assert moved(model, before) == (DIRECTIONS if stage == "direction" else MAGNITUDES) | {"head"}
        kept = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
        stirred = {kept[k] for (k, n), v in numbers(optimizer).items() if state.get((k, n)) != v}
        assert all(not p.equal(before[name]) for name, p in model.named_parameters() if p in stirred)


def test_a_stage_is_a_role_a_set_of_roles_or_the_generators_own():
    model = build(SORA(MAP(FLoRA(r=(2, 3))), rank=2))
    order = ["direction.output", ("core", "magnitude"), ["rotation"], "direction", ("direction.input", "rotation")]
    expected = [{"A"}, {"core", "alpha", "beta"}, {"C", "D"}, {"A", "B", "core"}, {"B", "C", "D"}]
    optimizer = adamw(model)
    turns = stages(model, optimizer, order=order, steps=1)
    for step, names in enumerate(expected):
        assert turns.stage == (tuple(order[step]) if isinstance(order[step], list) else order[step])
        before = values(model)
        train(model, optimizer, step, step + 1)
        assert moved(model, before) == names | {"head"}


@pytest.mark.parametrize("cycle", [True, False])
def test_the_schedule_is_the_list_written_out(cycle):
    plan = Schedule(("direction", "magnitude", "rotation"), (2, 1, 3), cycle)
    turn = [0, 0, 1, 2, 2, 2]
    expected = turn * 3 if cycle else turn + [2] * 12
    assert [plan.index(step) for step in range(18)] == expected


def test_joint_training_is_no_call_and_one_stage_of_all_and_what_comes_after_detach():
    models = [build() for _ in range(3)]
    optimizers = [adamw(model) for model in models]
    stages(models[1], optimizers[1], order=[("direction", "magnitude")], steps=1)
    stages(models[2], optimizers[2], steps=1).detach()
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 0, 5)
        assert same(model, models[0])
        assert numbers(optimizer) == numbers(optimizers[0])
    apart = build()
    optimizer = adamw(apart)
    stages(apart, optimizer, steps=1)
    train(apart, optimizer, 0, 5)
    assert not same(apart, models[0])


@pytest.mark.parametrize("when", ["stages first", "load first"])
@pytest.mark.parametrize("cycle", [True, False])
def test_resumption_is_exact_from_any_step(when, cycle, tmp_path):
    for stop in range(8):
        model = build()
        optimizer = adamw(model)
        stages(model, optimizer, steps=(2, 3), cycle=cycle)
        train(model, optimizer, 0, stop)
        torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "file")
        train(model, optimizer, stop, stop + 7)

        again = build(seed=9)
        fresh = adamw(again)
        turns = stages(again, fresh, steps=(2, 3), cycle=cycle) if when == "stages first" else None
        weights, state = torch.load(tmp_path / "file", weights_only=True)
        again.load_state_dict(weights)
        fresh.load_state_dict(state)
        turns = turns or stages(again, fresh, steps=(2, 3), cycle=cycle)
        assert turns.step == stop
        train(again, fresh, stop, stop + 7)
        assert same(model, again), stop
        assert numbers(optimizer) == numbers(fresh)


def test_loading_a_state_from_before_the_stages_begins_them():
    model = build()
    optimizer = adamw(model)
    train(model, optimizer, 0, 3)
    joint = copy.deepcopy(optimizer.state_dict())
    turns = stages(model, optimizer, steps=2)
    train(model, optimizer, 3, 6)
    assert (turns.step, turns.stage) == (3, "magnitude")
    optimizer.load_state_dict(joint)
    assert (turns.step, turns.stage) == (0, "direction")
    before = values(model)
    train(model, optimizer, 6, 7)
    assert moved(model, before) == DIRECTIONS | {"head"}


def test_going_back_within_one_process_is_exact():
    model = build()
    optimizer = adamw(model)
    stages(model, optimizer, steps=2)
    train(model, optimizer, 0, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 3, 8)
    end = values(model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, 3, 8)
    assert moved(model, end) == set()


def test_closures_change_nothing():
    plain, closed = build(), build()
    for model in (plain, closed):
        optimizer = adamw(model)
        turns = stages(model, optimizer, steps=2)
        for index in range(6):

            def closure(model=model, optimizer=optimizer, index=index):
                optimizer.zero_grad()
                return backward(model, index)

            if model is plain:
                closure()
                optimizer.step()
            elif index % 2:
                optimizer.step(closure=closure)
            else:
                assert optimizer.step(closure).requires_grad
        assert turns.step == 6
    assert same(plain, closed)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_evaluates_many_times_and_moves_nothing_that_sleeps(search):
    model = build()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(parameters, lr=0.1, max_iter=4, history_size=5, line_search_fn=search)
    turns = stages(model, optimizer, steps=2)
    calls = []

    def closure():
        calls.append(turns.stage)
        optimizer.zero_grad()
        return backward(model)

    for step in range(8):
        before = values(model)
        optimizer.step(closure)
        expected = MAGNITUDES if step % 4 >= 2 else DIRECTIONS
        assert moved(model, before) == expected | {"head"}, step
    assert turns.step == 8
    assert len(calls) >= 24


def test_clipping_counts_only_what_trains_and_what_sleeps_has_no_gradient():
    model = build()
    optimizer = adamw(model)
    turns = stages(model, optimizer, steps=1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for index, stage in enumerate(["direction", "magnitude", "direction"]):
        assert turns.stage == stage
        backward(model, index)
        mine = DIRECTIONS if stage == "direction" else MAGNITUDES
        awake = {n: p for n, p in model.named_parameters() if n.startswith("4.") or n.rsplit(".", 1)[1] in mine}
        assert {n for n, p in model.named_parameters() if p.grad is not None} == awake.keys()
        expected = math.sqrt(sum(p.grad.square().sum().item() for p in awake.values()))
        everything = [*parameters, *model.parameters()]
        assert nn.utils.clip_grad_norm_(dict.fromkeys(everything), 1.0).item() == pytest.approx(expected, rel=1e-12)
        optimizer.step()  # without zero_grad: what went to sleep must not keep a gradient
        assert all(p.grad is None for p in parameters if not p.requires_grad)


def test_accumulated_gradients_are_one_step():
    model = build()
    optimizer = adamw(model)
    turns = stages(model, optimizer, steps=1)
    for step in range(3):
        before = values(model)
        for part in range(4):
            backward(model, 4 * step + part)
            assert turns.step == step
        optimizer.step()
        optimizer.zero_grad()
        assert moved(model, before) == (MAGNITUDES if step == 1 else DIRECTIONS) | {"head"}
    assert turns.step == 3


@pytest.mark.parametrize("kind", ["AdamW", "fused AdamW"])
def test_a_step_that_a_gradient_scaler_skips_is_none(kind):
    model = build()
    optimizer = OPTIMISERS[kind](model)
    turns = stages(model, optimizer, steps=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    counts = []
    for index in range(5):
        before = values(model)
        loss = model(batch(index)).square().mean() * (math.inf if index in (1, 2) else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        counts.append(turns.step)
        assert bool(moved(model, before)) == (index not in (1, 2))
    assert counts == [1, 1, 1, 2, 3]


def accelerated(optimizer):
    from accelerate import Accelerator  # heavy, and the processes below need none of it

    return Accelerator(cpu=True).prepare(optimizer)


def lightnings(optimizer):
    from lightning.pytorch.core.optimizer import LightningOptimizer

    return LightningOptimizer(optimizer)


@pytest.mark.parametrize("wrap", [accelerated, lightnings, lambda optimizer: lightnings(accelerated(optimizer))])
def test_trainers_wrappers_are_unwrapped(wrap):
    model = build()
    optimizer = adamw(model)
    wrapped = wrap(optimizer)
    assert wrapped is not optimizer
    turns = stages(model, wrapped, steps=1)
    train(model, optimizer, 0, 1)
    assert (turns.step, turns.stage) == (1, "magnitude")
    with pytest.raises(TrainingError, match=r"torch\.optim\.Optimizer is needed"):
        stages(build(), object(), steps=1)


@pytest.fixture
def process_group(tmp_path):
    yield lambda: distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_a_blank_step_of_torchs_checkpoints_does_not_count_and_a_warm_up_step_does():
    model = build()
    optimizer = adamw(model)
    turns = stages(model, optimizer, steps=1)
    get_optimizer_state_dict(model, optimizer)  # takes a step, with rate and gradients of zero
    assert optimizer.state
    assert turns.step == 0
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 0, 1)
    assert turns.step == 1


def test_a_blank_step_makes_state_of_what_sleeps_where_there_are_processes(process_group):
    process_group()
    model = build()
    optimizer = adamw(model)
    turns = stages(model, optimizer, steps=1)
    get_optimizer_state_dict(model, optimizer)
    assert len(optimizer.state) == sum(p.requires_grad for p in model.parameters()) == 12
    assert turns.step == 0
    before = values(model)
    train(model, optimizer, 0, 1)
    assert moved(model, before) == DIRECTIONS | {"head"}


@pytest.mark.parametrize("when", ["stages first", "load first"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_torchs_checkpoints_resume_exactly(when, stop):
    model = build()
    optimizer = adamw(model)
    stages(model, optimizer, steps=2)
    train(model, optimizer, 0, stop)
    saved = copy.deepcopy((model.state_dict(), get_optimizer_state_dict(model, optimizer)))
    train(model, optimizer, stop, stop + 5)
    again = build(seed=9)
    fresh = adamw(again)
    turns = stages(again, fresh, steps=2) if when == "stages first" else None
    again.load_state_dict(saved[0])
    # What has never trained has no state yet; torch wants to hear that this is fine.
    set_optimizer_state_dict(again, fresh, saved[1], options=StateDictOptions(strict=stop != 1))
    turns = turns or stages(again, fresh, steps=2)
    train(again, fresh, stop, stop + 5)
    assert turns.step == stop + 5
    assert same(model, again)
    assert numbers(optimizer) == numbers(fresh)


def test_detach_gives_the_flags_back():
    model = build()
    model[0].adapter.inner.inner.A.requires_grad_(False)  # by hand, and it stays so
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    optimizer = adamw(model)
    with stages(model, optimizer, steps=2) as turns:
        train(model, optimizer, 0, 3)
        assert not model[2].adapter.inner.inner.A.requires_grad
        assert not model[0].adapter.inner.inner.A.requires_grad
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    turns.detach()
    assert (turns.step, turns.stage) == (3, "magnitude")
    train(model, optimizer, 3, 4)
    assert turns.step == 3
    assert not any("adapterzoo_stage_step" in group for group in optimizer.param_groups)
    later = stages(model, optimizer, steps=2)
    train(model, optimizer, 4, 5)
    turns.detach()  # of no effect on the later ones
    train(model, optimizer, 5, 6)
    assert (later.step, later.stage, turns.step) == (2, "magnitude", 3)
    assert not model[2].adapter.inner.inner.A.requires_grad


def test_stages_end_with_an_error_in_their_block():
    model = build()
    with pytest.raises(KeyError), stages(model, adamw(model), steps=2):
        raise KeyError
    assert all(p.requires_grad for layer in (model[0], model[2]) for p in layer.adapter.parameters())


def test_second_stages_on_a_model_are_an_error_until_the_first_are_gone():
    model = build()
    optimizer = adamw(model)
    turns = stages(model, optimizer, steps=2)
    for other in (optimizer, adamw(model)):
        with pytest.raises(TrainingError, match=r"(?s)have stages already; detach\(\) those first.*0\.adapter\.alpha"):
            stages(model, other, order=["magnitude"], steps=2)
    assert turns.stage == "direction"
    assert not model[0].adapter.alpha.requires_grad
    turns.detach()
    optimizer = adamw(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # makes a cycle of references
    stages(model, optimizer, steps=2)
    gone = weakref.ref(optimizer)
    del optimizer, turns
    turns = stages(model, adamw(model), steps=1)  # the optimiser of the last stages is out of reach
    assert gone() is None
    assert model[0].adapter.inner.inner.A.requires_grad
    del turns, model
    gc.collect()


ERRORS = {
    "no role 'magnitud'; roles: direction, direction.input, direction.output, direction.dense, core, magnitude, "
    "rotation; did you mean 'magnitude'?": {"order": ["direction", "magnitud"]},
    "no role 'buffer'": {"order": ["direction", "buffer"]},
    "has the role 'rotation'; here are direction, direction.input, direction.output, magnitude": {
        "order": ["direction", ("magnitude", "rotation")]
    },
    "has the role 'direction.dense'; here are direction, direction.input, direction.output, magnitude; did you mean "
    "'direction": {"order": ["direction.dense", "magnitude"]},
    "order='direction' is not valid: it should be a sequence of stages": {"order": "direction"},
    "order=[] is not valid": {"order": []},
    "order=[()] is not valid": {"order": [()]},
    "order=[1] is not valid": {"order": [1]},
    "steps=0 is not valid: it should be a whole number ≥ 1, or one for each of the 2 stages": {"steps": 0},
    "steps=True is not valid": {"steps": True},
    "steps=1.5 is not valid": {"steps": 1.5},
    "steps=(1, 0) is not valid": {"steps": (1, 0)},
    "steps=(1,) is not valid": {"steps": (1,)},
    "steps=(1, 2.0) is not valid": {"steps": (1, 2.0)},
    "steps='12' is not valid": {"steps": "12"},
}


@pytest.mark.parametrize("sentence", ERRORS)
def test_what_cannot_be_is_a_sentence_and_changes_nothing(sentence):
    model = build()
    optimizer = adamw(model)
    with pytest.raises(TrainingError) as caught:
        stages(model, optimizer, **{"steps": 2, **ERRORS[sentence]})
    assert sentence in str(caught.value)
    assert all(p.requires_grad for layer in (model[0], model[2]) for p in layer.adapter.parameters())
    assert "adapterzoo_stage_step" not in optimizer.param_groups[0]


def test_an_optimiser_that_lacks_a_parameter_and_a_model_without_adapters():
    model = build()
    heads = torch.optim.SGD([*model[4].parameters(), *model[0].adapter.inner.parameters()], lr=0.1)
    with pytest.raises(TrainingError, match="does not hold these parameters") as caught:
        stages(model, heads, steps=1)
    assert "0.adapter.alpha" in str(caught.value)
    assert "0.adapter.inner" not in str(caught.value)
    plain = nn.Linear(3, 2)
    with pytest.raises(TrainingError, match="here are no adapters"):
        stages(plain, torch.optim.SGD(plain.parameters(), lr=0.1), steps=1)
    optimizer = adamw(model)
    model[0].merge()
    with pytest.raises(MergedError, match="unmerge these"):
        stages(model, optimizer, steps=1)


@pytest.mark.filterwarnings("ignore::adapterzoo.errors.ImportanceWarning")  # as it should: see tests/test_attach.py
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("closed", ["", "by position", "by keyword"])
@pytest.mark.parametrize("first", ["stages", "attach"])
def test_penalties_that_attach_adds_do_not_move_what_sleeps(first, closed, many, process_group):
    if many:
        process_group()
    model = build(MAP(AdaLoRA(r=3, target_r=2)))
    optimizer = adamw(model)
    made = [lambda: stages(model, optimizer, steps=1), lambda: attach(model, optimizer, total_steps=20)]
    for make in made if first == "stages" else made[::-1]:
        make()
    for step in range(4):
        before = values(model)

        def closure(step=step):
            optimizer.zero_grad()
            return backward(model, step)

        if closed == "by position":
            optimizer.step(closure)
        elif closed == "by keyword":
            optimizer.step(closure=closure)
        else:
            closure()
            optimizer.step()
        assert moved(model, before) == ({"alpha", "beta"} if step % 2 else {"P", "lam", "Q"}) | {"head"}


def test_processes_that_start_after_the_stages_are_an_error(process_group):
    model = build()
    optimizer = adamw(model)
    turns = stages(model, optimizer, steps=1)
    train(model, optimizer, 0, 1)
    process_group()
    before = values(model)
    with pytest.raises(TrainingError, match=r"call stages after torch\.distributed\.init_process_group"):
        train(model, optimizer, 1, 2)
    assert moved(model, before) == set()
    turns.detach()
    stages(model, optimizer, steps=1)
    train(model, optimizer, 1, 2)
    assert moved(model, before) == DIRECTIONS | {"head"}


def together(model, wrapped, optimizer, x):
    """Seven steps; what moved and the norm that clipping sees, by step."""
    seen = []
    for _ in range(7):
        before = {name: whole(p) for name, p in model.named_parameters()}
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        changed = {name for name, p in model.named_parameters() if not whole(p).equal(before[name])}
        seen.append((changed, whole(norm).item()))
    return seen


def whole(value):
    value = value.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()


def process(rank, store, reference):
    """One of two processes: DDP in every order and FSDP2 do what one process does with the whole batch."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    expected, end = torch.load(reference, weights_only=True)
    x = batch(0)[:6]
    for order, options in itertools.product(
        ("stages first", "DDP first"),
        ({}, {"find_unused_parameters": True}, {"static_graph": True, "gradient_as_bucket_view": True}),
    ):
        model = build()
        wrapped = None if order == "stages first" else DistributedDataParallel(model, **options)
        optimizer = adamw(model)
        stages(wrapped or model, optimizer, steps=2)
        wrapped = wrapped or DistributedDataParallel(model, **options)
        compare(model, together(model, wrapped, optimizer, x[rank::2]), expected, end)
    model = build()
    fully_shard(model)
    optimizer = torch.optim.AdamW(
        param_groups(model, 0.01, weight_decay=0.1, magnitude_weight_decay=0.1, scale_aware=True)
    )
    plain = param_groups(build(), 0.01, scale_aware=True)
    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [(g["name"], g["lr"]) for g in plain]
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    stages(model, optimizer, steps=2)
    compare(model, together(model, model, optimizer, x[rank::2]), expected, end)
    distributed.destroy_process_group()


def compare(model, seen, expected, end):
    for (names, norm), (expected_names, expected_norm) in zip(seen, expected, strict=True):
        assert names == set(expected_names)
        assert norm == pytest.approx(expected_norm, rel=1e-9)
    for name, p in model.named_parameters():
        torch.testing.assert_close(whole(p), end[name], rtol=1e-9, atol=1e-12)


def test_several_processes_do_what_one_does(tmp_path):
    model = build()
    optimizer = adamw(model)
    stages(model, optimizer, steps=2)
    seen = together(model, model, optimizer, batch(0)[:6])
    torch.save([[(sorted(names), norm) for names, norm in seen], values(model)], tmp_path / "reference")
    multiprocessing.spawn(process, (tmp_path / "store", tmp_path / "reference"), nprocs=2)
