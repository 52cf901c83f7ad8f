"""Packed runs give what the same runs give by themselves, and where they can't be packed, they are not."""

import json
from dataclasses import replace

import pytest
import torch
from strategies import perturb
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from adapterzoo import MAP, FLoRA, Frozen, LoRA, adapt, adapted_layers
from adapterzoo.ablation.packing import bundle, stacked
from adapterzoo.ablation.packing.calls import losses
from adapterzoo.ablation.packing.choice import ROUNDS, Chooser, Way
from adapterzoo.ablation.packing.host import Host
from adapterzoo.ablation.packing.pack import pack, packable
from adapterzoo.ablation.packing.sharing import own_places, share
from adapterzoo.ablation.packing.trees import UnpackableError, joined, parted
from adapterzoo.ablation.tasks.loop import train
from adapterzoo.ablation.tasks.task import Outcome, Run, Scores, Task, columns
from adapterzoo.errors import AdapterError, TrainingError
from adapterzoo.pieces import Generator, Wrapper, layers_of
from adapterzoo.registry import parse, pieces
from adapterzoo.streams import stream

CPU = torch.device("cpu")
WORDS, WIDTH, LENGTH, CLASSES = 11, 8, 5, 3
LAYERS = ["embed", "conv", "up", "down"]
TIMES = {"ms_per_step", "seconds", "packed"}


def _small(kind, *inside):
    """A piece that fits the small layers, with a rank of 2 or blocks of one."""
    sizes = {"r": 2, "block_size": 1}
    return kind(*inside, **{name: size for name, size in sizes.items() if name in kind.model_fields})


GENERATORS = [_small(kind) for kind in pieces().values() if issubclass(kind, Generator)]
WRAPPERS = [kind for kind in pieces().values() if issubclass(kind, Wrapper)]
PAIRS = [
    *GENERATORS,
    *(MAP(generator) for generator in GENERATORS),
    *(_small(wrapper, generator) for wrapper in WRAPPERS for generator in (LoRA(r=2, alpha=5), FLoRA(r=(3, 2)))),
]
DEEP = parse("MAP(DoRA(SORA(PreDiag(LoRA(r=2, alpha=5)), rank=2)))")


class Block(nn.Module):
    """An embedding, a convolution, a normalised perceptron and a head; `kind` spoils it in one way."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.embed, self.conv = nn.Embedding(WORDS, WIDTH), nn.Conv1d(WIDTH, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6) if kind == "mixes" else nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 6, bias=False)
        self.head = nn.Linear(6, CLASSES)
        self.drop = nn.Dropout(0.3 if kind == "drops" else 0.0)

    def forward(self, words, mask=None):
        weights = torch.ones_like(words) if mask is None else mask
        x = self.conv((self.embed(words) * weights[..., None]).mT)
        x = self.norm(x).mT if self.kind == "mixes" else self.norm(x.mT)
        if self.kind == "turns":  # tokens first, so that the first axis is not the batch
            x = x.transpose(0, 1)
        x = x + self.down(torch.tanh(self.up(self.drop(x))))
        x = x.transpose(0, 1) if self.kind == "turns" else x
        if self.kind == "per token":
            return self.head(x)
        return self.head((x * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True))


class Tiny(Task):
    """Words to classes. `kind` of the model; from which step on the batches of seed 2 are longer, and what fails."""

    name = "tiny"
    trained = ("head",)
    packable = True

    steps: int = 6
    lr: float = 1e-2
    looks: int = 2
    batch: int = 4
    targets: tuple[str, ...] = tuple(LAYERS)
    kind: str = ""
    longer: int = 1000
    masked: bool = True
    fails: tuple[int, int] = (-1, 0)
    lost: tuple[int, int] = (-1, 0)
    breaks: tuple[int, int] = (-1, 0)
    double: bool = True

    def fingerprint(self):
        return ""

    def load(self, folder):
        return None

    def model(self, shared, seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Block(self.kind)
        with torch.no_grad():
            model.head.weight.normal_(generator=stream("head", seed))
        return model.double() if self.double else model

    def batches(self, shared, seed):
        draw = stream("batches", seed)
        for step in range(self.steps):
            if (seed, step) == self.fails:
                raise OSError(f"no batch for seed {seed}")
            length = LENGTH + 2 if seed == 2 and step >= self.longer else LENGTH
            yield (
                torch.randint(1, WORDS, (self.batch, length), generator=draw),
                torch.randint(CLASSES, (self.batch,), generator=draw),
                torch.tensor(torch.nan if (seed, step) == self.lost else 1.0),
                (seed, step) == self.breaks,
            )

    def loss(self, model, batch):
        words, labels, factor, breaks = batch
        if breaks:
            raise ValueError("a loss can't be computed")
        if self.kind == "reads":
            return F.cross_entropy(model.head(torch.ones(self.batch, 6).double()), labels)
        mask = (words > 0).to(torch.float64 if self.double else torch.float32)
        logits = model(words, mask=mask) if self.masked else model(words)
        if self.kind == "per token":
            return F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(words.shape[1]))
        more = model(words.flip(1)).square().mean() if self.kind == "twice" else 0
        return F.cross_entropy(logits, labels) * factor + more

    def scores(self, model, shared, part, seed):
        words = torch.randint(1, WORDS, (20, LENGTH), generator=stream(part, seed))
        logits = model(words)
        score = logits.flatten(1).softmax(dim=1)[:, 0]
        return Scores(
            {"accuracy": float((score > 0.3).double().mean()), "loss": float(score.mean())}, columns(score=score)
        )


class Own(Tiny):
    """With a loop of its own."""

    name = "own"

    def run(self, run):
        return Outcome({})


class Log:
    """Takes metrics as they come."""

    def __init__(self):
        self.lines = []

    def __call__(self, step, metrics):
        self.lines.append((step, dict(metrics)))


def _run(spec, seed, log=None, **others):
    composition = parse(spec) if isinstance(spec, str) else spec
    return Run(composition, seed, None, CPU, True, log or Log(), **others)


def _both(tasks, runs, wish="packed"):
    """What packing gave, and each run by itself, and the choice; logs stand in the runs."""
    choices = []
    together = pack(tasks, [replace(run, log=Log()) for run in runs], wish, choices.append)
    tasks = [tasks] * len(runs) if isinstance(tasks, Task) else tasks
    alone = [train(task, run) for task, run in zip(tasks, runs, strict=True)]
    return together, alone, choices[0]


def _agree(packed, alone, rel):
    """All that was measured but times is the same."""
    assert packed.metrics.keys() - {"packed"} == alone.metrics.keys()
    for name in alone.metrics.keys() - TIMES:
        assert packed.metrics[name] == pytest.approx(alone.metrics[name], rel=rel, abs=rel), name
    assert packed.examples.keys() == alone.examples.keys()
    for name, column in alone.examples.items():
        assert packed.examples[name] == pytest.approx(column, rel=rel, abs=rel)


def _same_log(packed, alone, rel):
    assert [step for step, _ in packed.lines] == [step for step, _ in alone.lines]
    for (step, mine), (_, own) in zip(packed.lines, alone.lines, strict=True):
        assert mine.keys() == own.keys()
        for name in own.keys() - TIMES:
            assert mine[name] == pytest.approx(own[name], rel=rel, abs=rel), (step, name)


# One model for several runs


def _models(specs, kind="", dtype=torch.float64):
    models = []
    for seed, spec in enumerate(specs):
        model = Tiny(kind=kind).model(None, seed).to(dtype)
        adapt(model, spec, LAYERS, train=["head"], seed=seed)
        for layer in adapted_layers(model).values():
            perturb(layer, 0.3, torch.Generator().manual_seed(seed))
        models.append(model.train())
    for model in models[1:]:
        share(models[0], model)
    return models


def _compare(models, by_stacks, rel=1e-10):
    draw = torch.Generator().manual_seed(5)
    inputs = [torch.randint(WORDS, (4, LENGTH), generator=draw) for _ in models]
    functional = torch.randn(4, CLASSES, generator=draw).to(models[0].head.weight.dtype)
    apart = []
    for model, words in zip(models, inputs, strict=True):
        output = model(words)
        (output * functional).sum().backward()
        apart.append((output.detach(), [p.grad for p in _trained(model)]))
        model.zero_grad()
    host = Host(models, by_stacks)
    outputs = host.answer([((words,), {}) for words in inputs])
    torch.stack([(output * functional).sum() for output in outputs]).sum().backward()
    host.hand_out()
    for model, output, (own, gradients) in zip(models, outputs, apart, strict=True):
        torch.testing.assert_close(output.detach(), own, rtol=rel, atol=rel)
        for parameter, gradient in zip(_trained(model), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=rel, atol=rel)
    return host


def _trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def _is_bulky(spec):
    """Whether its update is neither thin nor dense, or has no values."""
    bulky = {"LoKr", "OFT", "BoRA", "ColumnDoRA"}
    return spec == Frozen() or any(type(piece).__name__ in bulky for piece in layers_of(spec))


@pytest.mark.parametrize("by_stacks", [True, False])
@pytest.mark.parametrize("spec", [*PAIRS, DEEP], ids=repr)
def test_every_pair_on_every_kind_of_layer_gives_outputs_and_gradients_of_the_runs_apart(spec, by_stacks):
    models = _models([spec] * 3)
    host = _compare(models, by_stacks)
    assert len(host.stacks) == (len(LAYERS) if by_stacks and not _is_bulky(spec) else 0)


def test_runs_of_different_specs_stand_side_by_side_and_equal_ones_are_stacked():
    specs = [parse(text) for text in ("LoRA(r=2)", "LoRA(r=2)", "MAP(LoRA(r=3))", "Full()", "Full()", "Full()")]
    host = _compare(_models(specs), True)
    assert len(host.stacks) == 2 * len(LAYERS)


def test_a_16_bit_base_rounds_as_its_layers_do():
    _compare(_models([parse("MAP(LoRA(r=2))")] * 2, dtype=torch.bfloat16), True, rel=1e-6)


def test_conv1d_of_transformers_is_stacked_too():
    models = []
    for seed in range(3):
        torch.manual_seed(0)
        model = nn.ModuleDict({"layer": Conv1D(5, 4)}).double()
        adapt(model, parse("DoRA(LoRA(r=2))"), ["layer"], seed=seed)
        perturb(model["layer"], 0.3, torch.Generator().manual_seed(seed))
        models.append(model["layer"])
    x = torch.randn(3, 2, 4).double()
    packed = stacked.StackedLayer(models)(x.flatten(0, 1))
    torch.testing.assert_close(
        packed.unflatten(0, (3, 2)), torch.stack([m(part) for m, part in zip(models, x, strict=True)])
    )


def test_only_what_trains_or_differs_is_a_run_s_own():
    models = _models([parse("LoRA(r=2)")] * 2)
    assert own_places(models) == ["embed", "conv", "up", "down", "head"]
    with torch.no_grad():
        models[1].norm.weight = nn.Parameter(models[1].norm.weight + 1, requires_grad=False)
    assert "norm" in own_places(models)
    _compare(models, True)


def test_the_base_stands_in_memory_once_and_adapters_do_not_share():
    first, other = (Tiny().model(None, seed) for seed in (0, 1))
    for seed, model in enumerate((first, other)):
        adapt(model, parse("AdaLoRA(r=2)"), LAYERS, train=["head"], seed=seed)
    frozen = {name for name, p in other.named_parameters() if not p.requires_grad}
    freed = share(first, other)
    assert freed == sum(p.nbytes for name, p in other.named_parameters() if name in frozen) > 0
    places = dict(first.named_parameters())
    for name, p in other.named_parameters():
        assert (p.data_ptr() == places[name].data_ptr()) == (name in frozen), name
    assert first.up.adapter.mask.data_ptr() != other.up.adapter.mask.data_ptr()
    assert share(first, other) == 0


def test_a_pack_holds_one_base():
    packed = bundle.Bundle([Tiny()] * 3, [_run("LoRA(r=2)", seed) for seed in range(3)], "auto")
    models = [member.training.model for member in packed._members]
    assert len({model.up.weight.data_ptr() for model in models}) == 1
    assert len({model.up.adapter.A.data_ptr() for model in models}) == 3


def test_runs_of_one_composition_stand_side_by_side():
    specs = ["LoRA(r=2)", "Full()", "LoRA(r=2)"]
    packed = bundle.Bundle([Tiny()] * 3, [_run(spec, seed) for seed, spec in enumerate(specs)], "auto")
    assert [member.place for member in packed._members] == [0, 2, 1]


def test_a_frozen_weight_that_differs_is_left_alone():
    first, other = nn.Linear(3, 2).requires_grad_(False), nn.Linear(3, 2).requires_grad_(False)
    before = other.weight.clone()
    share(first, other)
    assert other.weight.equal(before)
    assert not first.weight.equal(other.weight)


def test_a_part_of_an_adapter_that_is_frozen_is_not_shared():
    first, other = _models([parse("LoRA(r=2)")] * 2)
    for model in (first, other):
        model.up.adapter.A.requires_grad_(False).copy_(torch.ones_like(model.up.adapter.A))
    assert share(first, other) == 0


def test_parameters_have_memory_of_their_own_again_when_a_host_is_released():
    models = _models([parse("LoRA(r=2)")] * 2)
    host = Host(models)
    first, second = (model.up.adapter.A for model in models)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    values = first.detach().clone()
    host.release()
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert first.equal(values)


# Whole runs

SPECS = [
    "LoRA(r=2)",
    "MAP(AdaLoRA(r=4, target_r=2))",
    None,
    "DoRA(FLoRA(r=2))",
    "MAP(AdaLoRA(r=4, target_r=2))",
    "Full()",
]


def test_runs_of_any_specs_and_seeds_give_what_they_give_by_themselves_in_float64():
    logs = [Log() for _ in SPECS]
    runs = [_run(spec, seed, log) for seed, (spec, log) in enumerate(zip(SPECS, logs, strict=True))]
    mine = [Log() for _ in SPECS]
    task = Tiny(steps=14, lr=3e-2)
    together = pack(task, [replace(run, log=log) for run, log in zip(runs, mine, strict=True)], "packed")
    for packed, run, log, own in zip(together, runs, mine, logs, strict=True):
        _agree(packed, train(task, run), 1e-10)
        assert packed.metrics["packed"] == len(SPECS)
        _same_log(log, own, 1e-10)
    assert len({metrics["rank/up"] for _, metrics in mine[1].lines if "rank/up" in metrics}) > 1  # ranks were allocated


def test_float32_runs_agree_within_the_stated_tolerance():
    task = Tiny(double=False, steps=20)
    runs = [_run("MAP(LoRA(r=2))", seed) for seed in range(4)]
    together, alone, choice = _both(task, runs)
    assert choice.way == "stacked"
    for packed, own in zip(together, alone, strict=True):
        _agree(packed, own, 1e-5)
        assert packed.metrics["test/accuracy"] == own.metrics["test/accuracy"]


def test_runs_may_differ_in_the_options_of_the_optimiser():
    tasks = [Tiny(lr=1e-3), Tiny(lr=1e-2, weight_decay=0.1), Tiny(lr=1e-1, schedule="linear", warmup=0.2)]
    together, alone, choice = _both(tasks, [_run("LoRA(r=2)", 0)] * 3)
    assert choice.way == "stacked"
    for packed, own in zip(together, alone, strict=True):
        _agree(packed, own, 1e-10)
    assert len({packed.metrics["test/loss"] for packed in together}) == 3


def test_a_loss_may_call_its_model_twice():
    together, alone, choice = _both(Tiny(kind="twice"), [_run("LoRA(r=2)", seed) for seed in range(2)])
    assert choice.way == "stacked"
    for packed, own in zip(together, alone, strict=True):
        _agree(packed, own, 1e-10)


@pytest.mark.parametrize("kind", ["", "per token"])
def test_batches_of_different_lengths_are_filled_up_where_the_model_minds_a_mask(kind):
    runs = [_run("DoRA(LoRA(r=2))", seed) for seed in range(3)]
    together, alone, choice = _both(Tiny(longer=0, kind=kind), runs)
    assert choice.way == "stacked"
    for packed, own in zip(together, alone, strict=True):
        _agree(packed, own, 1e-10)


def test_pack_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    for kind in ("", "drops"):
        pack(Tiny(kind=kind), [_run("LoRA(r=2)", seed) for seed in range(2)], "packed")
    assert torch.get_rng_state().equal(before)


def test_the_time_of_a_step_is_the_run_s_share():
    logs = [Log() for _ in range(4)]
    outcomes = pack(Tiny(steps=8), [_run("LoRA(r=2)", seed, log) for seed, log in enumerate(logs)], "packed")
    wall = 1000 * max(log.lines[-1][1]["seconds"] for log in logs)
    assert sum(line["ms_per_step"] for log in logs for _, line in log.lines[1:]) < wall
    assert sum(outcome.metrics["seconds"] for outcome in outcomes) < 4.1 * wall / 1000


# Runs that can't be packed


def _falls_back(task, reason, specs=("LoRA(r=2)", "LoRA(r=2)", "LoRA(r=2)")):
    together, alone, choice = _both(task, [_run(spec, seed) for seed, spec in enumerate(specs)])
    assert choice.way == "apart"
    assert reason in choice.why
    for packed, own in zip(together, alone, strict=True):
        assert packed.metrics["packed"] == 1
        assert {**packed.metrics, **own.metrics} == {**own.metrics, **packed.metrics, **_times(own)}
        assert all((packed.examples[name] == column).all() for name, column in own.examples.items())


def _times(outcome):
    return {name: outcome.metrics[name] for name in ("ms_per_step", "seconds")}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mixes", "changes norm.running_mean"),
        ("drops", "draws random numbers"),
        ("reads", "its loss reads 'head' of the model"),
    ],
)
def test_a_model_that_can_not_be_shared_is_trained_in_turns_bit_for_bit(kind, reason):
    _falls_back(Tiny(kind=kind), reason)


def test_buffers_that_a_forward_changes_are_put_back():
    """Runs of one seed have the same batches, so a shared norm over the batch would go unnoticed in the loss."""
    tasks = [Tiny(kind="mixes", lr=lr) for lr in (1e-3, 1e-2)]
    together, alone, choice = _both(tasks, [_run("LoRA(r=2)", 0)] * 2)
    assert choice.way == "apart"
    for packed, own in zip(together, alone, strict=True):
        _agree(packed, own, 0)


def test_a_model_with_tokens_first_is_found_out():
    _falls_back(Tiny(kind="turns"), "first axis")
    _falls_back(Tiny(kind="turns", batch=5), "", specs=["LoRA(r=2)"] * 5)  # an axis of 5 can be cut in 5


def test_batches_that_are_filled_up_are_found_out_where_the_model_minds_no_mask():
    _falls_back(Tiny(longer=0, masked=False), "a packed loss is")


def test_a_step_that_is_the_first_to_be_filled_up_is_proven_too():
    together, alone, choice = _both(Tiny(longer=4, masked=False), [_run("LoRA(r=2)", seed) for seed in range(3)])
    assert "a packed loss is" in choice.why
    for packed, own in zip(together, alone, strict=True):
        _agree(packed, own, 1e-10)


def test_dropout_of_adapters_is_found_out():
    _falls_back(Tiny(), "random", specs=["LoRA(r=2, dropout=0.5)"] * 2)


def test_pieces_that_can_not_be_stacked_are_sliced(monkeypatch):
    def fails(function):
        def call(*arguments):
            raise RuntimeError("vmap: no batching rule")

        return call

    monkeypatch.setattr(stacked, "vmap", fails)
    together, alone, choice = _both(Tiny(), [_run("MAP(LoRA(r=2))", seed) for seed in range(3)])
    assert (choice.way, dict(choice.refused)) == ("sliced", {"stacked": "vmap: no batching rule"})
    for packed, own in zip(together, alone, strict=True):
        _agree(packed, own, 1e-10)


@pytest.mark.parametrize(
    ("tasks", "runs", "reason"),
    [
        (Tiny(), 1, "takes two"),
        ([Tiny(), Tiny(steps=7)], 2, "differ in more than lr, schedule, warmup, weight_decay"),
        ([Tiny()] * 3, 2, "3 tasks for 2 runs"),
        (Own(), 2, "a loop of its own"),
    ],
)
def test_packable_says_why_not(tasks, runs, reason):
    assert reason in packable(tasks, [_run("LoRA(r=2)", seed) for seed in range(runs)])


def test_packable_takes_what_can_be_packed_and_asks_the_task(monkeypatch):
    runs = [_run("LoRA(r=2)", 0), _run(None, 1)]
    assert packable(Tiny(), runs) is None
    assert "different data" in packable(Tiny(), [runs[0], replace(runs[1], shared=object())])
    assert "different devices" in packable(Tiny(), [runs[0], replace(runs[1], device=torch.device("meta"))])
    monkeypatch.setattr(Tiny, "packable", False)
    assert "does not say that its model treats" in packable(Tiny(), runs)


def test_runs_that_are_not_packable_are_done_one_by_one():
    choices = []
    outcomes = pack(Own(), [_run("LoRA(r=2)", seed) for seed in range(2)], tell=choices.append)
    assert [outcome.metrics for outcome in outcomes] == [{}, {}]
    assert "a loop of its own" in choices[0].why


# Runs that fail


def _others_are_as_alone(task, runs, bad, error, match, choices=None):
    outcomes = pack(task, runs, "packed", ([] if choices is None else choices).append)
    assert isinstance(outcomes[bad], error)
    assert match in str(outcomes[bad])
    for place, run in enumerate(runs):
        if place != bad:
            _agree(outcomes[place], train(task, replace(run, log=Log())), 1e-10)


@pytest.mark.parametrize("step", [1, 2, 4])  # in a step apart, in the one that is proven, in a later one
def test_a_loss_that_is_not_finite_ends_its_run_alone_and_the_others_stay_packed(step):
    choices = []
    task, runs = Tiny(lost=(1, step)), [_run("LoRA(r=2)", seed) for seed in range(3)]
    _others_are_as_alone(task, runs, 1, TrainingError, f"loss is nan at step {step + 1}", choices)
    assert choices[0].way == "stacked"


@pytest.mark.parametrize("step", [0, 3])
def test_an_error_of_one_run_s_data_ends_that_run_alone(step):
    runs = [_run("MAP(LoRA(r=2))", seed) for seed in range(4)]
    _others_are_as_alone(Tiny(fails=(2, step)), runs, 2, OSError, "no batch for seed 2")


@pytest.mark.parametrize("step", [1, 2, 4])
def test_an_error_in_one_run_s_loss_ends_it_alone_and_the_others_stay_packed(step):
    choices = []
    task, runs = Tiny(breaks=(1, step)), [_run("LoRA(r=2)", seed) for seed in range(3)]
    _others_are_as_alone(task, runs, 1, ValueError, "a loss can't be computed", choices)
    assert (choices[0].way, dict(choices[0].refused)) == ("stacked", {})


def test_a_run_that_can_not_be_built_leaves_the_others():
    runs = [_run("LoRA(r=50)", 0), _run("LoRA(r=2)", 1), _run("LoRA(r=2)", 2)]
    _others_are_as_alone(Tiny(), runs, 0, AdapterError, "r=50")


def test_a_log_that_fails_ends_its_run_alone():
    def log(step, metrics):
        if step == 4:
            raise OSError("no space left on device")

    runs = [_run("LoRA(r=2)", 0), _run("LoRA(r=2)", 1, log), _run("LoRA(r=2)", 2)]
    _others_are_as_alone(Tiny(), runs, 1, OSError, "no space left")


def test_when_all_but_one_have_failed_the_last_goes_on_by_itself():
    task = Tiny(fails=(0, 3))
    outcomes = pack(task, [_run("LoRA(r=2)", seed) for seed in range(2)], "packed")
    assert isinstance(outcomes[0], OSError)
    _agree(outcomes[1], train(task, _run("LoRA(r=2)", 1)), 1e-10)


def test_runs_that_train_nothing_are_scored_as_they_are(monkeypatch):
    monkeypatch.setattr(Tiny, "trained", ())
    together, alone, _ = _both(Tiny(), [_run(None, 0), _run("LoRA(r=2)", 1), _run("LoRA(r=2)", 2)])
    for packed, own in zip(together, alone, strict=True):
        _agree(packed, own, 1e-10)


# The choice


def _chosen(wish, stacked_seconds, apart_seconds, steps=20):
    chooser, ways = Chooser(wish), []
    for _ in range(steps):
        ways.append(chooser.next())
        if ways.count(Way.STACKED) != 1 or ways[-1] is Way.APART:  # the first packed step is checked, and not timed
            chooser.took(ways[-1], stacked_seconds if ways[-1] is Way.STACKED else apart_seconds)
    return ways, chooser.choice(4)


def test_auto_takes_the_faster_way_after_a_few_steps_of_each():
    ways, choice = _chosen("auto", 0.010, 0.012)
    assert ways[:2] == [Way.APART] * 2
    assert ways[2:].count(Way.APART) == ROUNDS
    assert ways[-5:] == [Way.STACKED] * 5
    assert (choice.way, choice.ms) == ("stacked", pytest.approx({"stacked": 10.0, "apart": 12.0}))
    ways, choice = _chosen("auto", 0.013, 0.012)
    assert ways.count(Way.STACKED) <= ROUNDS + 1
    assert choice.way == "apart"
    assert "13 ms" in choice.why


def test_a_wish_settles_it():
    assert set(_chosen("apart", 0.01, 0.02)[0]) == {Way.APART}
    ways, choice = _chosen("packed", 0.02, 0.01)
    assert ways == [Way.APART] * 2 + [Way.STACKED] * 18
    assert choice.why == "asked for"


def test_a_choice_is_ready_for_json():
    choices = []
    pack(Tiny(steps=12), [_run("LoRA(r=2)", seed) for seed in range(2)], tell=choices.append)
    record = json.loads(json.dumps(choices[0].record()))
    assert record["runs"] == 2
    assert record["way"] in ("stacked", "apart")
    assert set(record["ms"]) == {"stacked", "apart"}
    assert record["why"].startswith("the faster of ")


def test_every_way_of_a_pack_is_proven_before_it_is_taken(monkeypatch):
    proofs = []
    prove = bundle.Member.prove
    monkeypatch.setattr(bundle.Member, "prove", lambda self: (proofs.append(self.place), prove(self)))
    pack(Tiny(longer=0), [_run("LoRA(r=2)", seed) for seed in range(3)], "packed")
    assert sorted(proofs) == [0, 1, 2]


def test_a_packed_gradient_that_is_wrong_is_found_out(monkeypatch):
    hand_out = stacked.Stack.hand_out

    def turned(self):
        hand_out(self)
        for values in self._own.values():
            grads = [value.grad for value in values]
            for value, grad in zip(values, grads[1:] + grads[:1], strict=True):
                value.grad = grad

    monkeypatch.setattr(stacked.Stack, "hand_out", turned)
    choices = []
    pack(Tiny(), [_run("LoRA(r=2)", seed) for seed in range(2)], "packed", choices.append)
    assert choices[0].way == "sliced"
    assert "a packed gradient is off" in choices[0].refused["stacked"]


# Trees and calls


def test_trees_are_joined_and_parted_along_the_batch():
    a, b = {"x": torch.arange(4).view(2, 2), "n": 1}, {"x": torch.arange(4, 8).view(2, 2), "n": 1}
    whole = joined([a, b])
    assert whole["x"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    first, second = parted(whole, [1, 1])
    assert first["x"].equal(a["x"])
    assert second["x"].equal(b["x"])
    with pytest.raises(UnpackableError, match=r"\[4, 2\] can't be the batch of 3 runs"):
        parted(whole, [2, 1])


def test_what_does_not_fit_together_is_named():
    with pytest.raises(UnpackableError, match="different settings"):
        joined([{"n": 1}, {"n": 2}])
    with pytest.raises(UnpackableError, match="different ways"):
        joined([{"n": 1}, {"m": 1}])
    with pytest.raises(UnpackableError, match=r"\[2, 3\], \[3, 3\]"):
        joined([torch.zeros(2, 3), torch.zeros(3, 3)], fill=True)
    with pytest.raises(UnpackableError, match="don't fit together"):
        joined([torch.zeros(2, 3), torch.zeros(2, 4)])


def test_a_loss_that_swallows_errors_is_asked_all_the_same():
    def careful(model, x):
        try:
            return model(x).sum()
        except Exception:
            return torch.zeros(())

    assert losses(careful, [torch.ones(2)] * 2, lambda calls: [3 * args[0] for args, _ in calls])[0] == 6


def test_runs_that_call_their_models_different_numbers_of_times_are_not_packed():
    def loss(model, n):
        return sum((model(torch.ones(1)) for _ in range(n)), torch.zeros(1)).sum()

    with pytest.raises(UnpackableError, match="different numbers of times"):
        losses(loss, [1, 2], lambda calls: [args[0] for args, _ in calls])
