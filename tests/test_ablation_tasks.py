"""The default loop, and the tasks `digits` and `minilm`."""

import argparse
import email.message
import gc
import math
import statistics
import time
from collections import OrderedDict, namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from adapterzoo import adapt, adapted_layers
from adapterzoo.ablation.docstrings import Split, pairs_of, unrepeated
from adapterzoo.ablation.minilm import Texts, embed_all, encoder, tokenise
from adapterzoo.ablation.tasks import minilm
from adapterzoo.ablation.tasks.devices import Randomness, moved
from adapterzoo.ablation.tasks.digits import Digits
from adapterzoo.ablation.tasks.images import batches, every_image, images_of
from adapterzoo.ablation.tasks.loop import Training, look_steps, rate_factor, train
from adapterzoo.ablation.tasks.measures import saved_bytes
from adapterzoo.ablation.tasks.minilm import MiniLM
from adapterzoo.ablation.tasks.prefix import Hidden, Tail, read_hidden, write_hidden
from adapterzoo.ablation.tasks.registry import make_task
from adapterzoo.ablation.tasks.sharing import sharing_copy
from adapterzoo.ablation.tasks.task import Run, Scores, Task, columns
from adapterzoo.errors import GridError, TargetError, TrainingError
from adapterzoo.registry import parse
from adapterzoo.streams import stream
from benchmarks import counted

CPU = torch.device("cpu")
GENERATORS = ("LoRA(r=2)", "AdaLoRA(r=2)", "FLoRA(r=2)")
WRAPS = ("{}", "MAP({})", "DoRA({})", "PreDiag({})", "SORA(PreDiag({}), rank=2)")
COMPOSITIONS = [wrap.format(generator) for generator in GENERATORS for wrap in WRAPS]
TIMES = ("ms_per_step", "seconds")


class Lines(Task):
    """Points on a plane through a hidden layer; `lost` makes a loss or a score that is no number."""

    name = "lines"
    trained = ("head",)

    steps: int = 6
    lr: float = 1e-2
    lost: str = ""
    given: int = 100
    pause: float = 0.0

    def fingerprint(self):
        return "lines"

    def load(self, folder):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(40, 8, generator=generator), torch.randn(40, 3, generator=generator)

    def model(self, shared, seed):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            first = nn.Linear(8, 8)
            torch.manual_seed(seed)
            return nn.Sequential(OrderedDict(first=first, act=nn.Tanh(), head=nn.Linear(8, 3)))

    def batches(self, shared, seed):
        order = stream("batches", seed)
        for _ in range(min(self.steps, self.given)):
            chosen = torch.randperm(40, generator=order)[: self.batch]
            yield shared[0][chosen], shared[1][chosen]

    def loss(self, model, batch):
        found = (model(batch[0]) - batch[1]).square().mean()
        return found * math.nan if self.lost == "loss" and found < 1e9 and self.seen(model) else found

    def seen(self, model):
        model.count = getattr(model, "count", 0) + 1
        return model.count == 3

    def scores(self, model, shared, part, seed):
        torch.rand(7)
        time.sleep(self.pause)
        rows = slice(0, 10) if part == "validation" else slice(10, 40)
        errors = (model(shared[0][rows]) - shared[1][rows]).square().mean(1)
        found = {"accuracy": math.nan if self.lost == part else 0.5, "loss": errors.mean().item()}
        return Scores(found, columns(id=torch.arange(40)[rows], score=-errors))


def run_of(task, spec="LoRA(r=2)", seed=3, test=False, shared=None, log=None):
    shared = task.load(None) if shared is None else shared
    return Run(parse(spec) if spec else None, seed, shared, CPU, test, log or (lambda step, metrics: None))


def logged(task, spec, **options):
    """The outcome, and what was told: metrics by step."""
    told = {}
    outcome = train(task, run_of(task, spec, log=lambda step, metrics: told.setdefault(step, dict(metrics)), **options))
    return outcome, told


def timeless(outcome):
    return {name: value for name, value in outcome.metrics.items() if name not in TIMES}


def numbers(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# The loop: what it draws


def test_a_run_repeats_itself_bit_for_bit_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    one = train(Lines(), run_of(Lines(), "LoRA(r=2, dropout=0.3)", test=True))
    torch.rand(5)
    before = torch.get_rng_state()
    two = train(Lines(), run_of(Lines(), "LoRA(r=2, dropout=0.3)", test=True))
    assert torch.get_rng_state().equal(before)
    assert not before.equal(state)
    assert timeless(one) == timeless(two)
    assert all((one.examples[name] == two.examples[name]).all() for name in one.examples)


def test_dropout_depends_on_the_seed_and_is_there():
    found = [logged(Lines(), f"LoRA(r=2, dropout={p})", seed=3)[1][6]["loss"] for p in (0.0, 0.5)]
    assert found[0] != found[1]


def test_a_model_trains_in_training_mode_and_is_scored_in_evaluation_mode():
    class Watched(Lines):
        def model(self, shared, seed):
            return super().model(shared, seed).eval()  # as from_pretrained gives it

        def loss(self, model, batch):
            modes.append(("loss", model.training))
            return super().loss(model, batch)

        def scores(self, model, shared, part, seed):
            modes.append((part, model.training))
            return super().scores(model, shared, part, seed)

    modes = []
    train(Watched(looks=3), run_of(Watched(), test=True))
    assert set(modes) == {("loss", True), ("validation", False), ("test", False)}
    assert len(modes) == 6 + 3 + 1


def test_runs_that_take_turns_give_what_they_give_one_after_the_other():
    tasks = [(Lines(), run_of(Lines(), spec, seed=seed)) for spec, seed in (("LoRA(r=2, dropout=0.5)", 1), (None, 2))]
    alone = [timeless(train(*item)) for item in tasks]
    both = [Training(*item) for item in tasks]
    while any(training.left for training in both):
        for training in both:
            training.step()
    assert [timeless(training.finish()) for training in both] == alone


def test_how_often_a_run_looks_changes_nothing_that_it_gives():
    few, many = (train(Lines(looks=n), run_of(Lines(), "LoRA(r=2, dropout=0.5)", test=True)) for n in (1, 6))
    assert timeless(few) == timeless(many)


@pytest.mark.parametrize("spec", ["MAP(LoRA(r=2))", "SORA(PreDiag(LoRA(r=2)), rank=2)"])
def test_cells_of_one_seed_share_base_head_batches_and_first_values(spec):
    bare, wrapped = (Training(Lines(), run_of(Lines(), text)) for text in ("LoRA(r=2)", spec))
    left, right = (adapted_layers(item.model)["first"] for item in (bare, wrapped))
    assert left.weight.equal(right.weight)
    assert all(a.equal(b) for a, b in zip(left.adapter.parameters(), right.adapter.generator.parameters(), strict=True))
    assert bare.model.head.weight.equal(wrapped.model.head.weight)
    assert bare.batch()[0].equal(wrapped.batch()[0])


def test_another_seed_draws_another_head_batch_and_generator():
    one, other = (Training(Lines(), run_of(Lines(), seed=seed)) for seed in (1, 2))
    assert not one.model.head.weight.equal(other.model.head.weight)
    assert not one.batch()[0].equal(other.batch()[0])
    first, second = (adapted_layers(item.model)["first"].adapter.A for item in (one, other))
    assert not first.equal(second)


# The loop: what it trains


def test_only_adapters_and_what_the_task_names_train():
    training = Training(Lines(), run_of(Lines(), "DoRA(LoRA(r=2))"))
    before = numbers(training.model)
    while training.left:
        training.step()
    moved_names = {name for name, value in numbers(training.model).items() if not value.equal(before[name])}
    assert moved_names == {
        "first.adapter.magnitude", "first.adapter.inner.A", "first.adapter.inner.B", "head.weight", "head.bias"
    }  # fmt: skip
    assert training.finish().metrics["adapter_parameters"] == 8 + 2 * 8 + 2 * 8
    assert training.finish().metrics["head_parameters"] == 3 * 8 + 3


def test_without_a_spec_the_head_alone_trains():
    training = Training(Lines(), run_of(Lines(), None))
    before = numbers(training.model)
    outcome = train(Lines(), run_of(Lines(), None))
    while training.left:
        training.step()
    moved_names = {name for name, value in numbers(training.model).items() if not value.equal(before[name])}
    assert moved_names == {"head.weight", "head.bias"}
    assert (outcome.metrics["adapter_parameters"], outcome.metrics["head_parameters"]) == (0, 27)


def test_where_nothing_trains_the_model_is_scored_as_it_is():
    class Headless(Lines):
        trained = ()

    outcome, told = logged(Headless(), None, test=True)
    assert list(told) == [0]
    expected = Lines().scores(Lines().model(None, 3), Lines().load(None), "test", 3).metrics["loss"]
    assert outcome.metrics["test/loss"] == pytest.approx(expected)
    assert "ms_per_step" not in outcome.metrics


def test_a_run_that_may_not_test_never_sees_the_test_part():
    class Watched(Lines):
        def scores(self, model, shared, part, seed):
            parts.append(part)
            return super().scores(model, shared, part, seed)

    parts = []
    tuned = train(Watched(), run_of(Watched(), test=False))
    assert set(parts) == {"validation"}
    assert not [name for name in tuned.metrics if name.startswith("test")]
    assert tuned.examples["id"].tolist() == list(range(10))
    parts.clear()
    reported = train(Watched(), run_of(Watched(), test=True))
    assert parts[-1] == "test"
    assert parts.count("test") == 1
    assert reported.examples["id"].tolist() == list(range(10, 40))
    assert reported.metrics["validation/loss"] == tuned.metrics["validation/loss"]


def test_the_steps_are_those_of_adamw_by_hand():
    task = Lines(steps=4, weight_decay=0.1, schedule="linear", warmup=0.25, lr=0.05)
    training = Training(task, run_of(task, "MAP(LoRA(r=2))"))
    twin = Training(task, run_of(task, "MAP(LoRA(r=2))")).model
    while training.left:
        training.step()
    magnitudes = [p for name, p in twin.named_parameters() if name.endswith(("alpha", "beta", "head.bias"))]
    others = [p for name, p in twin.named_parameters() if name.endswith((".A", ".B", "head.weight"))]
    optimizer = torch.optim.AdamW(
        [{"params": magnitudes, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.1}]
    )
    for factor, batch in zip((1.0, 1.0, 2 / 3, 1 / 3), task.batches(task.load(None), 3), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * factor
        task.loss(twin, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(numbers(training.model), numbers(twin))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5]),
    ],
)
def test_the_rate_rises_along_a_line_and_falls_along_the_schedule(schedule, expected):
    task = Lines(steps=6, warmup=1 / 3, schedule=schedule)
    assert [rate_factor(task, step) for step in range(6)] == pytest.approx(expected)
    assert [logged(task, None)[1][step + 1]["lr"] / task.lr for step in range(6)] == pytest.approx(expected)


def test_ranks_are_allocated_where_the_composition_says_so():
    task = Lines(steps=10, looks=10)
    _, told = logged(task, "MAP(AdaLoRA(r=4, target_r=1))")
    ranks = [told[step]["rank/first"] for step in range(11)]
    assert (ranks[0], ranks[-1]) == (4, 1)
    assert ranks == sorted(ranks, reverse=True)
    _, fixed = logged(task, "AdaLoRA(r=4)")
    assert {fixed[step]["rank/first"] for step in range(11)} == {4}


# The loop: what it tells and measures


def test_looks_are_spread_evenly_and_the_last_one_is_the_result():
    assert sorted(look_steps(10, 3)) == [4, 7, 10]
    assert sorted(look_steps(2, 5)) == [1, 2]
    outcome, told = logged(Lines(steps=10, looks=3), "LoRA(r=2)")
    assert [step for step in told if "validation/loss" in told[step]] == [4, 7, 10]
    assert told[10]["validation/loss"] == outcome.metrics["validation/loss"]
    assert list(told) == list(range(11))
    assert all({"loss", "lr", "seconds", "ms_per_step"} <= set(told[step]) for step in range(1, 11))


def test_magnitudes_of_one_number_are_told_as_they_are_and_others_as_ratios():
    training = Training(Lines(), run_of(Lines(), "MAP(DoRA(PreDiag(LoRA(r=2))))"))
    norm = adapted_layers(training.model)["first"].weight.norm().item()
    start = training._trajectories.now()
    assert start == pytest.approx({
        "magnitude/alpha/first": norm, "magnitude/beta/first": 1.0,
        "magnitude/m.inner.magnitude/first": 1.0, "magnitude/m.inner.inner.diag/first": 1.0,
    })  # fmt: skip
    adapter = adapted_layers(training.model)["first"].adapter
    with torch.no_grad():
        adapter.beta.fill_(-0.25)
        adapter.inner.magnitude[:4] *= -3
    now = training._trajectories.now()
    assert now["magnitude/beta/first"] == -0.25
    assert now["magnitude/m.inner.magnitude/first"] == pytest.approx(2.0)


def test_a_single_magnitude_of_many_numbers_is_m_and_a_start_of_zero_does_not_count():
    task = Lines()
    training = Training(task, run_of(task, "DoRA(LoRA(r=2))"))
    assert training._trajectories.now() == pytest.approx({"magnitude/m/first": 1.0})

    class Dead(Lines):
        def model(self, shared, seed):
            model = super().model(shared, seed)
            with torch.no_grad():
                model.first.weight[0] = 0
            return model

    dead = Training(Dead(), run_of(Dead(), "DoRA(LoRA(r=2))"))
    assert dead._trajectories.now() == pytest.approx({"magnitude/m/first": 1.0})


def test_the_loss_that_is_told_is_the_one_before_the_step():
    task = Lines()
    _, told = logged(task, "LoRA(r=2)")
    first = task.loss(task.model(None, 3), next(iter(task.batches(task.load(None), 3)))).item()
    assert told[1]["loss"] == pytest.approx(first)


def test_memory_is_gradients_and_moments_and_what_the_backward_pass_keeps():
    # The head alone, x: [32, 8] -> [32, 3]: AdamW keeps two moments and a step of 4 bytes for each of 2 parameters;
    # the backward pass keeps x of the head (tanh's output), and what the square keeps: the difference.
    outcome, _ = logged(Lines(), None)
    trained = 4 * 27
    assert outcome.metrics["memory_bytes"] == 3 * trained + 2 * 4 + 4 * 32 * 8 + 4 * 32 * 3


def test_the_count_of_what_is_kept_is_that_of_the_benchmarks():
    task = Digits(steps=2)
    base = digits_shared(task)
    for spec in ("LoRA(r=2)", "MAP(FLoRA(r=2))", "DoRA(LoRA(r=2, dropout=0.1))"):
        training = Training(task, run_of(task, spec, shared=base))
        batch, model = training.batch(), training.model
        everything = [*model.parameters(), *model.buffers()]
        loss, found = saved_bytes(lambda m=model, b=batch: task.loss(m, b), everything)
        expected = counted.saved_bytes(lambda m=model, b=batch: task.loss(m, b), everything)
        assert found == expected > 10_000
        assert loss.requires_grad


def test_the_second_step_is_the_one_that_is_counted():
    class Growing(Lines):
        def batches(self, shared, seed):
            return [(shared[0][:n], shared[1][:n]) for n in (4, 32, 8)]

    outcome = train(Growing(steps=3), run_of(Growing(steps=3), None))
    assert outcome.metrics["memory_bytes"] == train(Lines(), run_of(Lines(), None)).metrics["memory_bytes"]


def test_a_count_leaves_nothing_behind():
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    kept = [saved_bytes(lambda: layer(x).exp().sum(), layer.parameters())[1] for _ in range(3)]
    assert kept == 3 * [4 * 4 * 8 * 2]
    gc.collect()
    assert not [item for item in gc.get_objects() if type(item).__name__ == "_Saved"]


def test_time_of_a_step_leaves_out_looks_and_the_first_step():
    class Slow(Lines):
        def loss(self, model, batch):
            time.sleep(0.2 if not hasattr(model, "begun") else 0.0)
            model.begun = True
            return super().loss(model, batch)

    task = Slow(pause=0.2, looks=2, steps=2)
    outcome, told = logged(task, None)
    assert outcome.metrics["ms_per_step"] == told[2]["ms_per_step"] < 90 < 200 <= told[1]["ms_per_step"]
    assert outcome.metrics["seconds"] >= told[2]["seconds"] >= told[1]["seconds"] + 0.2 >= 0.6


def test_a_loss_that_is_no_number_is_an_error_with_step_and_cell():
    with pytest.raises(TrainingError, match=r"MAP\(LoRA\(r=2.*, seed 3, lr 0.01: loss is nan at step 3 of 6"):
        train(Lines(lost="loss"), run_of(Lines(), "MAP(LoRA(r=2))"))


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_score_that_is_no_number_is_an_error(part):
    with pytest.raises(TrainingError, match=f"{part}/accuracy is nan at step"):
        train(Lines(lost=part), run_of(Lines(), test=True))


def test_a_loss_that_is_no_number_changes_nothing():
    training = Training(Lines(lost="loss"), run_of(Lines()))
    training.step()
    training.step()
    before = numbers(training.model)
    with pytest.raises(TrainingError):
        training.step()
    assert all(parameter.grad is None for parameter in training.model.parameters())
    assert all(value.equal(before[name]) for name, value in numbers(training.model).items())
    with pytest.raises(TrainingError, match="loss is inf at step 3"):
        training.descend(math.inf)
    assert training.done == 2


def test_too_few_batches_are_an_error():
    with pytest.raises(TrainingError, match=r"lines\.batches gave 4 batches for 6"):
        train(Lines(given=4), run_of(Lines()))


def test_losses_may_be_computed_elsewhere():
    task = Lines()
    alone = timeless(train(task, run_of(task)))
    training = Training(task, run_of(task))
    while training.left:
        loss = task.loss(training.model, training.batch())
        loss.backward()
        training.descend(loss.item(), seconds=9.0)
    assert 9000 < training.finish().metrics["ms_per_step"] < 9100
    found = timeless(training.finish())
    assert {**found, "memory_bytes": 0} == {**alone, "memory_bytes": 0}


def test_batches_move_whatever_holds_their_tensors():
    pair = namedtuple("pair", "a b")
    batch = {"x": [torch.ones(2)], "y": pair(torch.ones(1), "text"), "n": 3}
    found = moved(batch, torch.device("meta"))
    assert found["x"][0].is_meta
    assert found["y"].a.is_meta
    assert (found["y"].b, found["n"]) == ("text", 3)
    assert isinstance(found["y"], pair)


def test_a_state_of_ones_own_goes_on_where_it_stopped():
    mine = Randomness(5, CPU)
    drawn = []
    for _ in range(2):
        with mine:
            drawn.append(torch.rand(3))
        torch.rand(4)
    assert torch.cat(drawn).equal(torch.rand(6, generator=torch.Generator().manual_seed(5)))


def test_a_sharing_copy_trains_nothing_of_its_model():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    twin = sharing_copy(model)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine is not other
        assert mine.data_ptr() == other.data_ptr()
    twin(torch.randn(4, 3))
    assert model[1].running_mean.equal(torch.zeros(3))
    twin[0].weight.requires_grad_(False)
    assert model[0].weight.requires_grad


# The digits


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What each backbone's task prepares."""
    folders = {}
    for backbone in ("transformer", "convnet"):
        folders[backbone] = tmp_path_factory.mktemp(backbone)
        Digits(backbone=backbone, pretraining=150).prepare(folders[backbone])
    return folders


def digits_shared(task):
    """A base that is not pretrained."""
    base = task.model(None, 0)
    return type("Shared", (), {"base": base, "images": images_of(task.adapt_to)})


def test_no_image_is_in_two_parts_and_the_test_part_is_the_same_for_every_seed():
    for seed in range(4):
        part = Digits().split(seed)
        assert [len(indices) for indices in part] == [200, 300, 300]
        assert len(set(torch.cat(part).tolist())) == 800
        assert part.test.equal(Digits().split(0).test)
    assert not Digits().split(1).train.equal(Digits().split(2).train)
    # Literal: a change of the draws changes every published number.
    assert Digits().split(1).test[:4].tolist() == [665, 549, 168, 708]
    assert Digits().split(1).train[:4].tolist() == [427, 392, 567, 546]


def test_no_image_is_in_the_data_twice():
    # Were it, indices that differ would not keep the parts apart.
    assert len(every_image().pixels.flatten(1).unique(dim=0)) == len(every_image().labels) == 1797


def test_images_have_the_place_of_their_digit_as_label():
    images = images_of((7, 2))
    digits = every_image().labels[images.numbers]
    assert set(digits.tolist()) == {2, 7}
    assert torch.where(digits == 7, 1, 0).equal(images.labels)
    assert images.pixels.equal(every_image().pixels[images.numbers])
    assert (images.pixels.min(), images.pixels.max()) == (-1, 1)


def test_batches_pass_over_every_image_before_any_comes_again():
    images = images_of(range(5, 10)).pick(torch.arange(200))
    seen = [batch.numbers for batch in batches(images, 50, 6, torch.Generator().manual_seed(0))]
    assert [len(batch) for batch in seen] == 6 * [50]
    assert sorted(torch.cat(seen[:4]).tolist()) == images.numbers.tolist()
    assert [len(batch.numbers) for batch in batches(images, 64, 5, torch.Generator())] == 5 * [64]


def test_pretraining_repeats_itself_and_sees_the_other_digits_alone(monkeypatch):
    seen = []
    loss = Digits.loss
    monkeypatch.setattr(Digits, "loss", lambda self, model, batch: seen.append(batch) or loss(self, model, batch))
    task = Digits(pretraining=6, adapt_to=[1, 3, 5, 7], test=100)
    state = torch.get_rng_state()
    one, two = (task.pretrained().state_dict() for _ in range(2))
    assert torch.get_rng_state().equal(state)
    assert all(one[name].equal(two[name]) for name in one)
    digits = every_image().labels[torch.cat([batch.numbers for batch in seen])]
    assert set(digits.tolist()) == {0, 2, 4, 6, 8, 9}
    assert max(batch.labels.max() for batch in seen) == 5
    assert not Digits(pretraining=7).pretrained().norm.weight.equal(one["norm.weight"])


@pytest.mark.parametrize("backbone", ["transformer", "convnet"])
def test_what_is_prepared_is_what_runs_start_from_and_do_not_change(tmp_path, backbone):
    task = Digits(backbone=backbone, steps=5, pretraining=5)
    task.prepare(tmp_path)
    shared = task.load(tmp_path)
    before = numbers(shared.base)
    expected = task.pretrained().state_dict()
    assert all(before[f"backbone.{name}"].equal(value) for name, value in expected.items())
    training = Training(task, run_of(task, "DoRA(LoRA(r=2))", shared=shared))
    for layer_name, layer in adapted_layers(training.model).items():
        assert layer.weight.data_ptr() == shared.base.get_submodule(layer_name).weight.data_ptr()
    while training.left:
        training.step()
    assert all(value.equal(before[name]) for name, value in numbers(shared.base).items())


@pytest.mark.parametrize("backbone", ["transformer", "convnet"])
def test_an_adapter_learns_the_new_digits_better_than_the_head_alone(prepared, backbone):
    task = Digits(backbone=backbone, looks=1, lr=3e-2)
    shared = task.load(prepared[backbone])
    head, lora = (
        train(task, run_of(task, spec, shared=shared, test=True)).metrics["test/accuracy"]
        for spec in (None, "LoRA(r=2)")
    )
    assert 0.4 < head < lora - 0.05
    assert lora > 0.85


@pytest.mark.parametrize("backbone", ["transformer", "convnet"])
@pytest.mark.parametrize("spec", COMPOSITIONS)
def test_every_composition_fits_both_backbones_without_values(backbone, spec):
    task = Digits(backbone=backbone)
    with torch.device("meta"):
        model = task.model(None, 0)
    adapted = adapted_layers(adapted_on(model, task, spec))
    assert len(adapted) == {"transformer": 13, "convnet": 3}[backbone]
    assert "head" not in adapted


def adapted_on(model, task, spec):
    adapt(model, parse(spec), task.targets if isinstance(task.targets, str) else list(task.targets), train=["head"])
    return model


@pytest.mark.parametrize("backbone", ["transformer", "convnet"])
def test_a_digit_is_treated_the_same_in_any_batch(backbone):
    task = Digits(backbone=backbone)
    model, pixels = task.model(None, 0), every_image().pixels[:6]
    torch.testing.assert_close(model(pixels), torch.cat([model(one[None]) for one in pixels]))


def test_scores_are_those_of_the_images(prepared):
    task = Digits()
    shared = task.load(prepared["transformer"])
    model = task.model(shared, 1)
    found = task.scores(model, shared, "test", 1)
    test = shared.images.pick(task.split(1).test)
    right = model(test.pixels).argmax(1) == test.labels
    assert found.metrics["accuracy"] == found.examples["score"].mean() == right.double().mean()
    assert found.metrics["loss"] == pytest.approx(F.cross_entropy(model(test.pixels), test.labels).item())
    assert (found.examples["id"] == test.numbers.numpy()).all()
    assert (found.examples["score"] == right.numpy()).all()


def test_a_run_trains_on_its_training_part_and_is_scored_on_the_others():
    task = Digits(steps=13)
    shared = digits_shared(task)
    parts = {name: shared.images.numbers[indices].tolist() for name, indices in task.split(4)._asdict().items()}
    seen = torch.cat([batch.numbers for batch in task.batches(shared, 4)]).tolist()
    assert len(set(seen)) > 190
    assert set(seen) <= set(parts["train"])
    for part in ("validation", "test"):
        assert task.scores(task.model(shared, 4), shared, part, 4).examples["id"].tolist() == parts[part]


def test_heads_and_batches_are_drawn_from_the_seed_alone():
    task = Digits(steps=3)
    shared = digits_shared(task)
    one, again, other = (task.model(shared, seed) for seed in (1, 1, 2))
    assert one.head.weight.equal(again.head.weight)
    assert one.head.weight.std().item() == pytest.approx(64**-0.5, rel=0.2)
    assert not one.head.weight.equal(other.head.weight)
    assert not one.head.bias.any()
    first, same, second = ([batch.numbers for batch in task.batches(shared, seed)] for seed in (1, 1, 2))
    assert all(a.equal(b) for a, b in zip(first, same, strict=True))
    order = [
        [task.split(seed).train.tolist().index(i) for i in torch.searchsorted(shared.images.numbers, batch).tolist()]
        for seed, batch in ((1, first[0]), (2, second[0]))
    ]
    assert order[0] != order[1]  # not only other images: another order of them


def test_the_convnet_has_its_convolutions_adapted_unless_told_otherwise():
    assert Digits().targets == "all-linear"
    assert Digits(backbone="convnet").targets == ("conv2", "conv3", "project")
    assert Digits(backbone="convnet", targets="all-linear").targets == "all-linear"
    again = Digits(**Digits(backbone="convnet").model_dump())
    assert again == Digits(backbone="convnet")


def test_the_order_of_digits_does_not_count():
    sizes = {"train": 50, "validation": 50, "test": 50}
    assert Digits(adapt_to=[9, 0], **sizes) == Digits(adapt_to=(0, 9), **sizes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapt_to": []}, "0 digits to adapt to and 10 to pretrain on; take 2 to 8 of the 10"),
        ({"adapt_to": list(range(10))}, "10 digits to adapt to and 0 to pretrain on"),
        ({"adapt_to": [4]}, "1 digits to adapt to"),
        ({"adapt_to": [1, 2, 2]}, "a digit comes twice"),
        ({"adapt_to": [1, 12, -1]}, r"\[-1, 12\] are no digits; choose from 0 to 9"),
        ({"adapt_to": "some"}, "adapt_to = 'some'"),
        ({"adapt_to": [1, 2]}, r"train \+ validation \+ test = 800, but there are 359 images of the digits \(1, 2\)"),
        ({"batch": 201}, "batch=201 is more than train=200 images; take batch ≤ 200"),
        ({"backbone": "resnet"}, "'transformer' or 'convnet'"),
        ({"adaptto": [1]}, "no option 'adaptto'.*did you mean 'adapt_to'"),
        ({"steps": 0, "lr": -1}, "(?s)lr = -1.*steps = 0"),
    ],
)
def test_bad_options_of_digits_are_errors(options, said):
    with pytest.raises(GridError, match=said):
        make_task({"name": "digits", **options})


def test_an_option_that_is_not_prepared_does_not_change_what_is_prepared():
    changed = {"train": 100, "validation": 50, "test": 60, "lr": 0.5, "steps": 7, "targets": "all-linear"}
    assert set(changed) <= Digits.unprepared
    assert {"backbone", "adapt_to", "pretraining"}.isdisjoint(Digits.unprepared)
    one, two = Digits(pretraining=3), Digits(pretraining=3, **changed)
    assert all(a.equal(b) for a, b in zip(one.pretrained().parameters(), two.pretrained().parameters(), strict=True))


# MiniLM


def tiny(blocks=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=blocks, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return BertModel(config, add_pooling_layer=False).eval()


def texts_of(count, width, key=0):
    generator = torch.Generator().manual_seed(key)
    lengths = torch.randint(3, width + 1, (count,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).long()
    return Texts(torch.randint(1, 40, (count, width), generator=generator) * mask, mask)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """`minilm` on three files of the standard library, on hidden states (2 blocks) and without them (6)."""
    found = {
        name: tuple(unrepeated(pairs_of(Path(module.__file__).read_bytes(), Path(f"{name}.py"))))
        for name, module in (("argparse", argparse), ("statistics", statistics), ("message", email.message))
    }
    parts = Split(found["argparse"] + found["statistics"], found["message"][:12], found["message"][12:24])
    options = {"docstring_tokens": 12, "code_tokens": 20, "candidates": 6, "batch": 4, "validation": 12, "test": 12}
    tasks = {blocks: MiniLM(blocks=blocks, steps=5, looks=2, **options) for blocks in (2, 6)}
    shared = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minilm, "standard_library", lambda: sum(found.values(), ()))
        patch.setattr(minilm, "split", lambda pairs: parts)
        for blocks, task in tasks.items():
            folder = tmp_path_factory.mktemp(f"blocks{blocks}")
            task.prepare(folder)
            shared[blocks] = task.load(folder)
    return tasks, shared, parts


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_last_blocks_on_kept_hidden_states_are_the_whole_encoder(tmp_path, blocks):
    whole, texts = tiny(), texts_of(9, 7)
    write_hidden(tmp_path / "kept", whole, texts, blocks, batch=4)
    tail, hidden = Tail(whole, blocks).eval(), read_hidden(tmp_path / "kept")
    torch.testing.assert_close(embed_all(tail, hidden), embed_all(whole, texts), rtol=0, atol=1e-6)
    names = {name for name, _ in whole.named_parameters()}
    assert {name for name, _ in tail.named_parameters()} == {
        name for name in names if any(f"layer.{i}." in name for i in range(3 - blocks, 3))
    }
    for chosen in torch.tensor([[i, 0, i] for i in range(9)]):
        assert hidden.pick(chosen).mask.equal(texts.pick(chosen).mask)
    assert min(hidden.pick(torch.tensor([i])).mask.shape[1] for i in range(9)) < 7


def test_kept_hidden_states_are_mapped_and_never_written_back(tmp_path):
    write_hidden(tmp_path / "kept", tiny(), texts_of(4, 5), 1)
    path = tmp_path / "kept" / "states.npy"
    before, hidden = path.read_bytes(), read_hidden(tmp_path / "kept")
    assert str(path) in Path("/proc/self/maps").read_text()
    hidden._rows[0].zero_()
    assert path.read_bytes() == before


def test_training_on_hidden_states_is_training_of_the_whole_encoder(small):
    tasks, shared, _ = small
    last = r"encoder\.layer\.[45]\..*(query|key|value|dense)"
    spec = "MAP(DoRA(LoRA(r=2)))"
    tail = logged(tasks[2], spec, shared=shared[2], test=True)
    whole = logged(tasks[6].model_copy(update={"targets": last}), spec, shared=shared[6], test=True)
    for name in ("loss", "validation/loss", "validation/mrr"):
        found, expected = ([line[name] for line in told.values() if name in line] for _, told in (tail, whole))
        assert found == pytest.approx(expected, abs=1e-5)
    assert len(expected) == 2
    assert tail[0].metrics["adapter_parameters"] == whole[0].metrics["adapter_parameters"]
    torch.testing.assert_close(
        *(torch.from_numpy(outcome.examples["loss"]) for outcome, _ in (tail, whole)), rtol=0, atol=1e-5
    )
    assert (tail[0].examples["place"] == whole[0].examples["place"]).all()
    layers = [name for name in tail[1][0] if name.startswith("magnitude/alpha")]
    assert sorted(layers) == sorted(name for name in whole[1][0] if name.startswith("magnitude/alpha"))
    assert len(layers) == 12


def test_hidden_states_in_float16_would_be_off(small):
    _, shared, _ = small
    kept = shared[2].parts["test"].codes
    lengths = kept.mask.sum(dim=1)
    rounded = Hidden(torch.cat(kept._rows).half().float(), lengths)
    exact, found = (embed_all(shared[2].base.eval(), hidden) for hidden in (kept, rounded))
    assert 1e-5 < (found - exact).abs().max() < 1e-3


def test_the_published_encoder_is_scored_as_it_is_without_a_spec(small):
    tasks, shared, parts = small
    outcome, told = logged(tasks[2], None, shared=shared[2], test=True)
    assert list(told) == [0]
    model = encoder().eval()
    docstrings = embed_all(model, tokenise([pair.docstring for pair in parts.test], 12))
    codes = embed_all(model, tokenise([pair.code for pair in parts.test], 20))
    near = torch.einsum("nw,ncw->nc", docstrings, codes[shared[2].parts["test"].candidates])
    places = (near >= near[:, :1]).sum(1)
    assert outcome.examples["place"].tolist() == places.tolist()
    assert len(set(places.tolist())) > 1
    assert outcome.metrics["test/mrr"] == pytest.approx((1 / places).mean().item(), rel=1e-6)
    assert outcome.metrics["test/accuracy"] == pytest.approx((places == 1).double().mean().item())
    assert outcome.metrics["test/loss"] == pytest.approx(-(near / 0.05).log_softmax(1)[:, 0].mean().item(), rel=1e-4)
    assert outcome.examples["score"].mean() == outcome.metrics["test/mrr"]
    assert outcome.examples["id"][0] == "message.py:{1} {2}".format(*parts.test[0].place)


def test_a_function_is_in_one_part_alone_and_a_batch_in_one_package(small):
    tasks, shared, _ = small
    parts = shared[2].parts
    places = [place for part in parts.values() for place in part.places]
    assert len(set(places)) == len(places)
    chosen = list(tasks[2].model_copy(update={"steps": 30})._chosen(parts["train"].packages, stream("x")))
    assert {len(batch) for batch in chosen} == {4}
    assert all(len(set(parts["train"].packages[batch].tolist())) == 1 for batch in chosen)
    a_pass = sum(int(count) // 4 for count in parts["train"].packages.unique(return_counts=True)[1])
    assert len(set(torch.cat(chosen[:a_pass]).tolist())) == 4 * a_pass


def test_batches_are_those_of_the_seed_and_pair_docstrings_with_their_code(small):
    tasks, shared, parts = small
    one, again, other = (list(tasks[6].batches(shared[6], seed)) for seed in (1, 1, 2))
    assert all(a.docstrings.ids.equal(b.docstrings.ids) for a, b in zip(one, again, strict=True))
    assert not all(a.docstrings.ids.equal(b.docstrings.ids) for a, b in zip(one, other, strict=True))
    docstrings = tokenise([pair.docstring for pair in parts.train], 12)
    codes = tokenise([pair.code for pair in parts.train], 20)
    width = one[0].docstrings.ids.shape[1], one[0].codes.ids.shape[1]
    for docstring, code in zip(one[0].docstrings.ids, one[0].codes.ids, strict=True):
        rows = (docstrings.ids[:, : width[0]] == docstring).all(1) & (codes.ids[:, : width[1]] == code).all(1)
        assert rows.any()


def test_a_batch_larger_than_every_package_is_an_error(small):
    tasks, shared, parts = small
    most = max(len([p for p in parts.train if p.package == name]) for name in ("argparse", "statistics"))
    task = tasks[2].model_copy(update={"batch": 500})
    with pytest.raises(TrainingError, match=f"has batch=500 functions; take batch ≤ {most}, or a larger train"):
        train(task, run_of(task, shared=shared[2]))


def test_runs_share_the_encoder_and_do_not_change_it(small):
    tasks, shared, _ = small
    before = numbers(shared[2].base)
    training = Training(tasks[2], run_of(tasks[2], "DoRA(LoRA(r=2))", shared=shared[2]))
    for name, layer in adapted_layers(training.model).items():
        assert layer.weight.data_ptr() == shared[2].base.get_submodule(name).weight.data_ptr()
    while training.left:
        training.step()
    assert all(value.equal(before[name]) for name, value in numbers(shared[2].base).items())


@pytest.mark.parametrize(("blocks", "layers"), [(1, 6), (2, 12), (6, 36)])
def test_minilm_without_values_has_the_layers_of_its_blocks(blocks, layers):
    with torch.device("meta"):
        model = MiniLM(blocks=blocks).model(None, 0)
    adapt(model, parse("SORA(PreDiag(FLoRA(r=4)))"))
    assert len(adapted_layers(model)) == layers
    assert f"encoder.layer.{6 - blocks}.attention.self.query" in adapted_layers(model)
    if blocks < 6:
        with torch.device("meta"):
            model = MiniLM(blocks=blocks).model(None, 0)
        with pytest.raises(TargetError):
            adapt(model, parse("LoRA(r=2)"), ["layer.0.attention.self.query"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"candidates": 40, "test": 30}, "candidates=40, but a part has 30 pairs; take candidates ≤ 30"),
        ({"blocks": 7}, "blocks = 7"),
        ({"blocks": 0}, "blocks = 0"),
        ({"docstring_tokens": 2}, "docstring_tokens = 2"),
        ({"test": 501}, "test = 501"),
        ({"token": 9}, "no option 'token'"),
    ],
)
def test_bad_options_of_minilm_are_errors(options, said):
    with pytest.raises(GridError, match=said):
        make_task({"name": "minilm", **options})


def test_the_fingerprint_follows_the_texts_and_the_weights(monkeypatch, tmp_path):
    pairs = tuple(pairs_of(Path(statistics.__file__).read_bytes(), Path("statistics.py")))
    monkeypatch.setattr(minilm, "standard_library", lambda: pairs)
    one = MiniLM().fingerprint()
    assert MiniLM(blocks=2).fingerprint() == one
    monkeypatch.setattr(minilm, "standard_library", lambda: pairs[1:])
    assert MiniLM().fingerprint() != one
    monkeypatch.setattr(minilm, "standard_library", lambda: pairs)
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(minilm.encoding, "folder", lambda: tmp_path)
    minilm._weights.cache_clear()
    assert MiniLM().fingerprint() != one
    minilm._weights.cache_clear()
