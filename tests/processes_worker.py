"""What one of several processes runs: `python processes_worker.py GROUP RANK WORLD FOLDER SECONDS`; no tests itself.

Every check is a function of the rank, and all processes run all checks of a group in the same order. What goes wrong is
written to FOLDER/rank{RANK}.txt, and so is where a process stands when its seconds are over. Everything is float64 and
without dropout, so that a run on several processes and one on a single process differ by round-off alone.
"""

import contextlib
import copy
import faulthandler
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import adapterzoo as az
from adapterzoo.errors import InputError, MergedError, RoundedMagnitudeWarning, TargetError

SPECS = [
    az.LoRA(r=3, alpha=2),
    az.MAP(az.LoRA(r=3, alpha=2)),
    az.DoRA(az.LoRA(r=3, alpha=2)),
    az.SORA(az.PreDiag(az.LoRA(r=3, alpha=2)), rank=2),
    az.MAP(az.DoRA(az.AdaLoRA(r=3, alpha=2))),
    az.FLoRA(r=(3, 2), scale=0.5),
    az.MAP(az.Full()),
]
DEEP = SPECS[4]
BUDGETED = az.MAP(az.DoRA(az.AdaLoRA(r=3, alpha=2, target_r=1, t_init=1, t_final=1, orth_weight=0.2)))
STEPS = 4
WIDTH, HIDDEN = 10, 15  # no shard of 15 rows, or of a rank of 3, is as large as its neighbour
CHECKS = {}
FOLDER = Path()


def check(group):
    def note(function):
        CHECKS.setdefault(group, []).append(function)
        return function

    return note


# A model, its data, and training.


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(torch.softmax(q @ k.mT / WIDTH**0.5, dim=-1) @ v)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, blocks=1, again=False):
        super().__init__()
        self.first, self.head = nn.Linear(7, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.again = again  # gradient checkpointing: blocks are computed again in the backward

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again and torch.is_grad_enabled() else block(x)
        return self.head(x)


def plain(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return Model(**options).to(dtype)


def adapted(spec, seed=0, dtype=torch.float64, **options):
    """A model with every trainable number away from its start, the same in every process."""
    model = plain(seed, dtype, **options)
    az.adapt(model, spec, train=["head"], seed=seed)
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(dtype))
    return model


def sharded(model, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def wrapped(kind, model):
    return {"ddp": DistributedDataParallel, "fsdp": sharded, "one": lambda same: same}[kind](model)


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def values(model):
    return {name.removeprefix("module."): whole(value.detach()).clone() for name, value in model.named_parameters()}


def batches(steps, micro=1):
    draw = torch.Generator().manual_seed(11)

    def some(width):
        return torch.randn(4, 5, width, generator=draw, dtype=torch.float64)

    return [[(some(7), some(3)) for _ in range(micro)] for _ in range(steps)]


def everything(batch):
    return batch


def mine(batch):
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


INPUT = batches(1)[0][0][0]


@contextlib.contextmanager
def synchronising(model, last):
    """Gradients are summed over the processes after the last micro-batch only."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    yield


def optimiser_of(model):
    return torch.optim.AdamW(trained(model), lr=3e-2)


def train(model, optimiser, data, part, clip=None):
    """Take a step for every list of micro-batches; what the first gradients were, with their norm before clipping."""
    seen = None
    for micros in data:
        optimiser.zero_grad()
        for number, (x, y) in enumerate(micros):
            with synchronising(model, number == len(micros) - 1):
                ((model(part(x)) - part(y)).square().mean() / len(micros)).backward()
        norm = nn.utils.clip_grad_norm_(trained(model), clip) if clip else torch.zeros(())
        seen = seen or [whole(norm), *(whole(p.grad).clone() for p in trained(model))]
        optimiser.step()
    return seen


def close(mine, true, what):
    torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12, msg=lambda text: f"{what}: {text}")


def same(mine, true, what):
    different = [name for name, value in true.items() if not mine[name].equal(value)]
    assert mine.keys() == true.keys(), what
    assert not different, f"{what}: not the same bits in {different}"


def message(error, call, *args, **options):
    try:
        call(*args, **options)
    except error as caught:
        return str(caught)
    raise AssertionError(f"no {error.__name__}")


@torch.no_grad()
def outputs(model):
    """The evaluation output, twice: from what is built and from what may have been kept."""
    model.eval()
    first, second = model(INPUT), model(INPUT)
    assert first.equal(second)
    model.train()
    return first


# Training, against one process on the whole batch.


def compare_training(kind, spec, steps, blocks=1, **options):
    data, clip = batches(steps, micro=2), 0.3
    one = adapted(spec, blocks=blocks)
    true = train(one, optimiser_of(one), data, everything, clip)
    model = wrapped(kind, adapted(spec, blocks=blocks, **options))
    found = train(model, optimiser_of(model), data, mine, clip)
    assert true[0] > clip  # so they were clipped
    close(found, true, f"{kind}, {spec!r}, gradients")
    close(values(model), values(one), f"{kind}, {spec!r}, parameters")


@check("training")
def ddp_trains_as_one_process_does(rank):
    for spec in SPECS:
        compare_training("ddp", spec, steps=3, again=spec is DEEP)


@check("training")
def fsdp_trains_as_one_process_does(rank):
    for spec in SPECS:
        compare_training("fsdp", spec, steps=2)
    compare_training("fsdp", DEEP, steps=4, blocks=2, again=True)


@check("training")
def one_shard_of_a_single_number_is_empty(rank):
    alpha = sharded(adapted(DEEP)).blocks[0].up.adapter.alpha
    assert alpha.shape == (1,)
    assert alpha.to_local().numel() == (1 if rank == 0 else 0)
    assert alpha.full_tensor().shape == (1,)


@check("training")
def layers_and_models_are_units_too(rank):
    one, x = adapted(DEEP), mine(INPUT)
    one(x).square().sum().backward()
    for units in ([], ["up", "qkv"]):
        model = adapted(DEEP)
        for name, layer in az.adapted_layers(model).items():
            if name.rpartition(".")[2] in units:
                fully_shard(layer)
        fully_shard(model)
        model(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                grad = one.get_parameter(name).grad.clone()
                dist.all_reduce(grad)
                close(whole(parameter.grad), grad / dist.get_world_size(), f"{units}, {name}")


@check("training")
def compiled_models_train_alike(rank):
    spec, data = az.DoRA(az.LoRA(r=2)), batches(1)
    one = adapted(spec)
    train(one, optimiser_of(one), data, everything)
    for kind in ("ddp", "fsdp"):
        inner = adapted(spec)
        for block in inner.blocks:
            block.up.compile(backend="aot_eager", fullgraph=True)
        model = wrapped(kind, inner)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dynamo's own code makes them by the dozen
            train(model, optimiser_of(model), data, mine)
        close(values(model), values(one), f"{kind}, compiled")


# DistributedDataParallel.


@check("training")
def ddp_makes_processes_equal_that_began_apart(rank):
    """Its broadcast writes into weights whose norms and factors are kept."""
    model = adapted(DEEP, seed=rank)
    before = outputs(model)
    wrapper = DistributedDataParallel(model)
    true = outputs(adapted(DEEP, seed=0))
    assert before.equal(true) == (rank == 0)
    assert outputs(wrapper).equal(true)


@check("training")
def ddp_comes_after_adapt(rank):
    model = DistributedDataParallel(plain())
    assert "adapt the model first, then wrap it" in message(TargetError, az.adapt, model, az.LoRA(r=2))
    assert type(model.module.head) is nn.Linear
    assert model.module.head.weight.requires_grad


@check("training")
def surgery_goes_through_ddp(rank):
    one, model = adapted(DEEP), DistributedDataParallel(adapted(DEEP))
    true, before = outputs(one), values(model)
    with az.disabled(model), az.disabled(one):
        close(outputs(model), outputs(one), "disabled")
    az.merge(model)
    close(outputs(model), true, "merged")
    az.unmerge(model)
    same(values(model), before, "unmerged")
    train(model, optimiser_of(model), batches(1), mine)  # and it still trains, alike in every process
    close(sums_over_processes(model), {name: 2 * value for name, value in values(model).items()}, "after surgery")
    az.reset_adapters(model, seed=4)
    az.reset_adapters(one, seed=4)
    adapters = {name: value for name, value in values(one).items() if ".adapter." in name}
    same({name: values(model)[name] for name in adapters}, adapters, "reset")


def sums_over_processes(model):
    found = values(model)
    for value in found.values():
        dist.all_reduce(value)
    return found


# State, saved and loaded. BUDGETED has a rank allocation, whose state is the optimiser's and the masks.


class Run:
    """A model in training: what is wrapped, its optimiser and what `attach` gave."""

    def __init__(self, kind, spec=BUDGETED, optimiser=torch.optim.AdamW):
        self.model = adapted(spec)
        self.wrapped = wrapped(kind, self.model)
        self.optimiser = optimiser(az.param_groups(self.wrapped, lr=3e-2, weight_decay=0.1))
        assert len(self.optimiser.param_groups) > 1
        self.attachment = az.attach(self.wrapped, self.optimiser, total_steps=STEPS)
        self.part = everything if kind == "one" else mine

    def train(self, first, last):
        train(self.wrapped, self.optimiser, batches(STEPS)[first:last], self.part)
        return self

    def masks(self):
        return {n.removeprefix("module."): b.clone() for n, b in self.model.named_buffers() if n.endswith("mask")}

    def everything(self):
        """Parameters, masks and the optimiser's state, whole and by name."""
        state = {
            f"{name}/{key}": whole(torch.as_tensor(value)).clone()
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimiser.state.get(parameter, {}).items()
        }
        return {**values(self.model), **self.masks(), **state, "step": torch.tensor(self.attachment.step)}


def compare_with_one_process(run):
    one = Run("one").train(0, STEPS)
    same(run.masks(), one.masks(), "masks, against one process")
    assert az.ranks(run.model) == az.ranks(one.model)
    assert sum(az.ranks(run.model).values()) == 5 * BUDGETED.inner.inner.target_r
    close(run.everything(), one.everything(), "against one process")
    kept = torch.cat(list(run.masks().values()))
    there = [torch.empty_like(kept) for _ in range(dist.get_world_size())]
    dist.all_gather(there, kept)
    assert all(mask.equal(kept) for mask in there)


@check("training")
def ddp_allocates_ranks_and_resumes(rank):
    run = Run("ddp").train(0, 2)
    file = FOLDER / f"ddp{rank}.pt"
    torch.save([run.wrapped.state_dict(), run.optimiser.state_dict()], file)
    assert 5 < sum(az.ranks(run.model).values()) < 15  # in the middle of the schedule
    run.train(2, STEPS)
    compare_with_one_process(run)
    again = Run("ddp")
    for part, state in zip((again.wrapped, again.optimiser), torch.load(file), strict=True):
        part.load_state_dict(state)
    same(again.train(2, STEPS).everything(), run.everything(), "resumed")


@check("state")
def fsdp_allocates_ranks_and_resumes(rank):
    """From a checkpoint in shards, and from a whole one that only rank 0 holds."""
    run = Run("fsdp").train(0, 2)
    save(run, "budgeted")
    full = copy.deepcopy(get_state_dict(run.wrapped, run.optimiser, options=StateDictOptions(full_state_dict=True)))
    on_rank_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
    run.train(2, STEPS)
    compare_with_one_process(run)
    end = run.everything()
    again = load(Run("fsdp"), "budgeted")
    assert again.attachment.step == 2
    same(again.train(2, STEPS).everything(), end, "resumed from dcp")
    again = Run("fsdp")
    model, optimiser = full if rank == 0 else ({}, {})
    set_model_state_dict(again.wrapped, model, options=on_rank_0)
    set_optimizer_state_dict(again.wrapped, again.optimiser, optimiser, options=on_rank_0)
    same(again.train(2, STEPS).everything(), end, "resumed from rank 0")


@check("state")
def ddp_and_fsdp_read_each_others_checkpoints(rank):
    run = Run("ddp").train(0, 2)
    save(run, "from_ddp")
    again = load(Run("fsdp"), "from_ddp")
    same(again.everything(), run.everything(), "ddp to fsdp")
    save(again, "from_fsdp")
    same(load(Run("ddp"), "from_fsdp").everything(), run.everything(), "fsdp to ddp")
    one = Run("one")
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(one.model, get_model_state_dict(again.wrapped, options=options))
    close(outputs(one.model), outputs(again.wrapped), "fsdp to one process")


def save(run, name):
    model, optimiser = get_state_dict(run.wrapped, run.optimiser)
    dcp.save({"model": model, "optimiser": optimiser}, checkpoint_id=FOLDER / name)


def load(run, name, options=None):
    """As torch's tutorial does it: what the fresh model and optimiser have is what is read."""
    model, optimiser = get_state_dict(run.wrapped, run.optimiser)
    state = {"model": model, "optimiser": optimiser}
    dcp.load(state, checkpoint_id=FOLDER / name)
    set_state_dict(
        run.wrapped,
        run.optimiser,
        model_state_dict=state["model"],
        optim_state_dict=state["optimiser"],
        options=options,
    )
    return run


@check("state")
def asking_for_an_optimisers_state_is_no_step(rank):
    """torch takes one with lr 0 and zero gradients where there is no state yet."""
    for kind in ("ddp", "fsdp"):
        run = Run(kind)
        before = {**values(run.model), **run.masks()}
        state = get_optimizer_state_dict(run.wrapped, run.optimiser)
        assert run.attachment.step == 0
        same({**values(run.model), **run.masks()}, before, kind)
        keys = {key for entry in state["state"].values() for key in entry}
        assert {"adapterzoo_sensitivity", "adapterzoo_uncertainty", "exp_avg"} <= keys
        run.train(0, STEPS)
        assert run.attachment.step == STEPS
        one = Run("one")
        get_optimizer_state_dict(one.wrapped, one.optimiser)  # Adam's own count goes up by that step
        close(run.everything(), one.train(0, STEPS).everything(), f"{kind}, trained after it")


@check("state")
def an_optimiser_without_state_of_its_own_resumes(rank):
    """strict=False, since torch expects state of every parameter or of none."""
    run = Run("fsdp", optimiser=torch.optim.SGD).train(0, 2)
    save(run, "sgd")
    run.train(2, STEPS)
    again = load(Run("fsdp", optimiser=torch.optim.SGD), "sgd", StateDictOptions(strict=False))
    same(again.train(2, STEPS).everything(), run.everything(), "SGD, resumed")


@check("state")
def a_flat_state_holds_it_too(rank):
    """With every key beside its parameter's name, as torch's flatten_optimizer_state_dict writes it."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    run, again = Run("fsdp").train(0, 2), Run("fsdp")
    set_model_state_dict(again.wrapped, get_model_state_dict(run.wrapped))
    state = get_optimizer_state_dict(run.wrapped, run.optimiser, options=options)
    set_optimizer_state_dict(again.wrapped, again.optimiser, copy.deepcopy(state), options=options)
    same(again.train(2, STEPS).everything(), run.train(2, STEPS).everything(), "flat")


@check("state")
def what_trains_is_saved_alone(rank):
    run = Run("fsdp").train(0, 2)
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    small = copy.deepcopy(get_model_state_dict(run.wrapped, options=options))
    assert "blocks.0.up.adapter.inner.inner.mask" in small
    assert "head.weight" in small
    assert "blocks.0.up.weight" not in small
    again = sharded(adapted(BUDGETED))
    set_model_state_dict(again, small, options=StateDictOptions(full_state_dict=True, strict=False))
    close(outputs(again), outputs(run.wrapped), "adapters alone")


# Operations on a sharded model.


@check("surgery")
def surgery_on_shards_is_surgery(rank):
    for spec in (SPECS[0], SPECS[3], DEEP, SPECS[6]):
        surgery_on(spec)


def surgery_on(spec):
    one, model = adapted(spec), sharded(adapted(spec))
    true = outputs(one)
    for gathered_before in (False, True)[: 1 + (spec is DEEP)]:  # a forward leaves the root's own layers whole
        if gathered_before:
            outputs(model)
        before = values(model)
        for name in ("first", "blocks.0.up"):
            layer = one.get_submodule(name)
            for made in ("effective_weight", "delta_weight"):
                found = getattr(model.get_submodule(name), made)()
                assert not hasattr(found, "full_tensor")
                close(found, getattr(layer, made)(), f"{spec!r}, {made} of {name}")
        az.merge(model)
        close(outputs(model), true, f"{spec!r}, merged")
        assert "already merged" in message(MergedError, az.merge, model)
        merged = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        same({name: merged[name] for name in before}, before, "a merged model's file")
        with az.disabled(model), az.disabled(one):
            close(outputs(model), outputs(one), f"{spec!r}, merged and disabled")
        az.unmerge(model)
        same(values(model), before, f"{spec!r}, unmerged")
        close(outputs(model), true, f"{spec!r}, unmerged")
    with az.disabled(model), az.disabled(one):
        close(outputs(model), outputs(one), f"{spec!r}, disabled")
    az.reset_adapters(model, seed=3)
    az.reset_adapters(one, seed=3)
    same(values(model), values(one), f"{spec!r}, reset")
    outputs(model)
    plain_model = az.unload(model, merge=True)
    assert not az.adapted_layers(plain_model)
    close(outputs(plain_model), outputs(az.unload(one, merge=True)), f"{spec!r}, unloaded")


@check("surgery")
def unloading_keeps_what_it_is_asked_to(rank):
    one = adapted(DEEP)
    for merge in (True, False):
        model = az.unload(sharded(adapted(DEEP)), merge=merge)
        if not merge:
            close(values(model), values(plain_of(one)), "base weights")
        true = outputs(az.unload(adapted(DEEP), merge=merge))
        close(outputs(model), true, f"unload, merge={merge}")
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        again = plain()
        again.load_state_dict(state)
        close(outputs(again), true, f"unload, merge={merge}, from its file")


def plain_of(one):
    return az.unload(copy.deepcopy(one), merge=False)


class Kinds(nn.Module):
    """A layer of every kind: a padded embedding, a grouped and a strided convolution, a transposed linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6, padding_idx=3)
        self.grouped = nn.Conv1d(6, 9, 3, padding="same", padding_mode="circular", groups=3)
        self.strided = nn.Conv2d(1, 5, (3, 2), padding=1, stride=2)
        self.mix, self.head = Conv1D(7, 5), nn.Linear(7, 3)

    def forward(self, tokens):
        x = self.grouped(self.embed(tokens).mT)
        return self.head(self.mix(self.strided(x[:, None]).movedim(1, -1)))


@check("surgery")
def every_kind_of_layer_trains_and_merges_in_shards(rank):
    tokens = torch.randint(0, 11, (4, 8), generator=torch.Generator().manual_seed(3))
    for spec in (az.MAP(az.DoRA(az.AdaLoRA(r=1))), az.FLoRA(r=(2, 1))):
        models = []
        for _ in range(2):
            model = Kinds().double()
            az.adapt(model, spec, targets=["embed", "grouped", "strided", "mix"], train=["head"])
            with torch.no_grad():
                draw = torch.Generator().manual_seed(1)
                for parameter in trained(model):
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
            models.append(model)
        one, model = models[0], models[1]
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for name in ("embed", "grouped", "strided", "mix"):
            fully_shard(getattr(model, name), mesh=mesh)
        fully_shard(model, mesh=mesh)
        for each, part in ((one, tokens), (model, tokens.chunk(dist.get_world_size())[rank])):
            optimiser = torch.optim.AdamW(trained(each), lr=1e-2)
            for _ in range(2):
                optimiser.zero_grad()
                each(part).square().mean().backward()
                optimiser.step()
        close(values(model), values(one), f"{spec!r}, trained")
        with torch.no_grad():
            before = one(tokens)
            az.merge(model)
            close(model(tokens), before, f"{spec!r}, merged")
            az.unmerge(model)
            close(model(tokens), before, f"{spec!r}, unmerged")


@check("surgery")
def training_goes_on_after_surgery(rank):
    one, model = adapted(DEEP), sharded(adapted(DEEP))
    for one_or_all in (one, model):
        az.merge(one_or_all)
        outputs(one_or_all)
        az.unmerge(one_or_all)
    train(one, optimiser_of(one), batches(2), everything)
    train(model, optimiser_of(model), batches(2), mine)
    close(values(model), values(one), "trained after merge and unmerge")
    close(outputs(model), outputs(one), "trained after merge and unmerge")


@check("surgery")
def a_merge_that_fails_changes_nothing(rank):
    model = sharded(adapted(DEEP))
    with torch.no_grad():
        model.blocks[0].down.adapter.alpha.fill_(torch.inf)  # the number is on rank 0 alone
    before = values(model)
    assert "'blocks.0.down'" in message(MergedError, az.merge, model)
    assert not any(layer.merged for layer in az.adapted_layers(model).values())
    same(values(model), before, "after a failed merge")


@check("surgery")
def merged_first_and_sharded_then(rank):
    one, model = adapted(DEEP), adapted(DEEP)
    before = values(model)
    az.merge(model)
    sharded(model)
    close(outputs(model), outputs(one), "merged, then sharded")
    with az.disabled(model), az.disabled(one):
        close(outputs(model), outputs(one), "merged, then sharded, disabled")
    az.unmerge(model)
    same(values(model), before, "merged, sharded, unmerged")
    close(outputs(model), outputs(one), "merged, sharded, unmerged")


@check("surgery")
def a_merge_may_forget_the_base(rank):
    model = sharded(adapted(DEEP))
    az.merge(model, keep_base=False)
    close(outputs(model), outputs(adapted(DEEP)), "without its base")
    assert "its base weight is gone" in message(MergedError, az.unmerge, model)
    close(outputs(az.unload(model, merge=True)), outputs(adapted(DEEP)), "without its base, unloaded")


@check("surgery")
def effective_weights_have_gradients(rank):
    """Every process takes the same function of the whole weight, and gets its shard of that function's gradient."""
    one, model = adapted(DEEP), sharded(adapted(DEEP))
    for each in (one, model):
        each.blocks[0].up.effective_weight().square().sum().backward()
    for (name, parameter), true in zip(model.named_parameters(), one.parameters(), strict=True):
        assert (parameter.grad is None) == (true.grad is None)
        if true.grad is not None:
            close(whole(parameter.grad), true.grad, name)


@check("surgery")
def the_meta_device_first(rank):
    """Adapt and shard without memory, materialise, load the base and reset, or load everything: as on one process."""
    one = plain(dtype=torch.float32)
    base = copy.deepcopy(one.state_dict())
    az.adapt(one, DEEP, train=["head"], seed=5)
    for file, complete in ((base, False), (one.state_dict(), True)):
        with torch.device("meta"):
            model = Model()
            az.adapt(model, DEEP, train=["head"], seed=5)
        sharded(model)
        model.to_empty(device="cpu")
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(model, file if rank == 0 else {}, options=options)
        if not complete:  # torch has filled it up with the model's own tensors
            assert "reset_adapters" in message(RuntimeError, model, INPUT.float())
            az.reset_adapters(model, seed=5)
        same(values(model), values(one), f"materialised, complete={complete}")
        torch.testing.assert_close(model(INPUT.float()), one(INPUT.float()))


@check("surgery")
def values_assigned_in_16_bits_are_widened(rank):
    """torch's other way from the meta device: shards of a file take the parameters' places, with their dtype."""
    one = adapted(DEEP, dtype=torch.float32)
    with torch.no_grad():
        for name, value in one.named_parameters():
            value.copy_(value.bfloat16() if ".adapter." in name else value)
    with torch.device("meta"):
        model = Model()
        az.adapt(model, DEEP, train=["head"])
    places = sharded(model).state_dict()
    file = {
        name: distribute_tensor(
            value.bfloat16() if ".adapter." in name else value, places[name].device_mesh, [Shard(0)]
        )
        if hasattr(places[name], "device_mesh")
        else value
        for name, value in one.state_dict().items()
    }
    model.load_state_dict(file, assign=True)
    az.refresh(model)
    assert {value.to_local().dtype for value in model.blocks[0].up.adapter.parameters()} == {torch.float32}
    same(values(model), values(one), "assigned")
    torch.testing.assert_close(model(INPUT.float()), one(INPUT.float()))
    model(INPUT.float()).sum().backward()
    optimiser_of(model).step()


@check("surgery")
def a_compacted_file_does_not_fit_shards(rank):
    one = adapted(az.AdaLoRA(r=3))
    one.blocks[0].up.adapter.mask[1] = 0
    assert az.compact(one)["blocks.0.up"] == 2
    model = sharded(adapted(az.AdaLoRA(r=3)))
    before = values(model)
    options = StateDictOptions(full_state_dict=True)
    text = message(RuntimeError, set_model_state_dict, model, one.state_dict(), options=options)
    assert "size mismatch for blocks.0.up.adapter.P" in text
    same({"P": values(model)["blocks.0.up.adapter.P"]}, {"P": before["blocks.0.up.adapter.P"]}, "after a failed load")


# What is refused, in words.


@check("surgery")
def shards_come_after_adapt(rank):
    model = sharded(plain())
    for gathered_before in (False, True):  # after a forward the root's layers look like any others
        if gathered_before:
            outputs(model)
        assert "adapt the model first" in message(TargetError, az.adapt, model, az.LoRA(r=2))
        assert "adapt the model first" in message(TargetError, az.adapt, model, az.LoRA(r=2), ["head"])
    assert not az.adapted_layers(model)


@check("surgery")
def a_layer_alone_says_who_gathers(rank):
    model = sharded(adapted(DEEP))
    text = message(InputError, model.blocks[0].up, torch.zeros(1, WIDTH, dtype=torch.float64))
    assert "'blocks.0.up'" in text
    assert "fully_shard" in text


@check("surgery")
def tensor_parallel_layers_are_refused(rank):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = plain()
    parallelize_module(model, mesh, {"head": ColwiseParallel()})
    assert "tensor parallel" in message(TargetError, az.adapt, model, az.LoRA(r=2), ["head"])
    message(NotImplementedError, parallelize_module, adapted(DEEP), mesh, {"blocks.0.up": ColwiseParallel()})


@check("surgery")
def a_plan_is_verified_on_shards(rank):
    model = plain()
    plan = az.adapt(model, DEEP, train=["head"])
    sharded(model)
    plan.verify(INPUT)
    model.blocks[0].forward = lambda x: x
    assert "4 adapted layers not called" in message(TargetError, plan.verify, INPUT)


# Nothing of an earlier gathering is used: FSDP2 fills the same tensors again, and torch's version counter stays.


def fresh_outputs(spec, model):
    """What an unsharded model with the same numbers computes."""
    one = adapted(spec, seed=9)
    one.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    az.refresh(one)
    return outputs(one)


def reshard(model):
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def change_in_place(model, seed):
    """Change every shard, the base's too, in the memory that FSDP2 gathers from."""
    reshard(model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local()
            local.mul_(1 + 0.3 * torch.rand(local.shape, generator=draw, dtype=torch.float64))


def change_behind_torchs_back(model, seed):
    reshard(model)
    for parameter in model.parameters():
        parameter.to_local().data.numpy()[...] *= 1.1


def change_by_loading(model, seed):
    state = get_model_state_dict(sharded(adapted(DEEP, seed=seed)))
    set_model_state_dict(model, state)


def change_by_training(model, seed):
    train(model, optimiser_of(model), batches(1), mine)


def give_the_ids_to_the_gathered_tensors(model):
    """Let every gathered tensor have the id that its layer has bound, which the memory allocator may do any time."""

    def spoil(layer, args):
        layer._norms._bound._id = id(layer.weight)
        for bound, (table, name) in zip(layer._factors._bound, layer._factors._places, strict=True):
            bound._id = id(table[name])

    for layer in az.adapted_layers(model).values():
        layer.register_forward_pre_hook(spoil)


@check("surgery")
def nothing_stale_is_used(rank):
    changes = (change_in_place, change_behind_torchs_back, change_by_loading, change_by_training)
    for again, spoiled in ((False, False), (True, True)):
        options = {"reshard_after_forward": again}
        model = sharded(adapted(DEEP), **options)
        if spoiled:
            give_the_ids_to_the_gathered_tensors(model)
        for seed, change in enumerate(changes):
            outputs(model)
            if seed % 2:
                az.refresh(model)  # while something is gathered
                outputs(model)
            change(model, seed)
            reshard(model)
            true = fresh_outputs(DEEP, model)
            close(outputs(model), true, f"{change.__name__}, {options}, evaluation")
            close(model(INPUT).detach(), true, f"{change.__name__}, {options}, training")


@check("surgery")
def nothing_is_kept_of_what_was_gathered(rank):
    model = sharded(adapted(DEEP))
    layers = az.adapted_layers(model).values()
    before = [layer._norms._kept for layer in layers]
    outputs(model)
    for layer, kept in zip(layers, before, strict=True):
        assert layer._norms._kept is kept
        assert layer._factors._kept is None


# Precision.


def dtypes_in_forward(model, x):
    """The dtypes that the adapter of one layer has while it runs."""
    seen = {}
    layer = model.blocks[0].up
    handle = layer.register_forward_pre_hook(
        lambda module, args: seen.update({name: value.dtype for name, value in module.adapter.named_parameters()})
    )
    model(x).sum().backward()
    handle.remove()
    return seen


@check("training")
def rounded_magnitudes_do_not_pass_in_silence(rank):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(adapted(DEEP, dtype=torch.float32), mp_policy=policy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = dtypes_in_forward(model, INPUT.float())
    assert seen["alpha"] is seen["inner.magnitude"] is torch.bfloat16
    texts = {str(entry.message) for entry in caught if entry.category is RoundedMagnitudeWarning}
    assert any(text.startswith("alpha, beta of MAP") for text in texts)
    assert any(text.startswith("magnitude of DoRA") for text in texts)
    assert model.blocks[0].up.adapter.alpha.dtype is torch.float32  # what the optimiser steps


@check("training")
def a_16_bit_base_keeps_float32_adapters(rank):
    """The way to mix: the base is cast, and FSDP2 gathers everything in its own dtype."""
    model = plain(dtype=torch.bfloat16)
    az.adapt(model, DEEP, train=["head"])
    fully_shard(model.head)  # FSDP2 wants one dtype for what trains in a unit
    sharded(model)
    seen = dtypes_in_forward(model, mine(INPUT).bfloat16())
    assert set(seen.values()) == {torch.float32}
    assert model.blocks[0].up.weight.dtype is torch.bfloat16
    assert all(p.grad.dtype is p.dtype for p in trained(model))


@check("training")
def autocast_keeps_them_too(rank):
    model = sharded(adapted(DEEP, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = dtypes_in_forward(model, INPUT.float())
    assert set(seen.values()) == {torch.float32}


# The harness itself.


@check("raises")
def one_rank_raises_and_the_other_waits(rank):
    if rank == 1:
        raise ValueError("rank 1 has something to say")
    dist.barrier()


@check("hangs")
def nothing_comes_of_it(rank):
    time.sleep(60)


def main(group, rank, world, folder, seconds):
    global FOLDER
    FOLDER, report = Path(folder), Path(folder) / f"rank{rank}.txt"
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # torch's own advice about a head that returns a view, which is not ours to mend
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    with report.open("w") as file:
        faulthandler.enable(file)
        faulthandler.dump_traceback_later(float(seconds), exit=True, file=file)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(rank), world_size=int(world))
        name = ""
        try:
            for function in CHECKS[group]:
                name = function.__name__
                start = time.time()
                function(int(rank))
                dist.barrier()
                print(f"{name} {time.time() - start:.2f} s", flush=True)
        except BaseException:
            file.write(f"{name}\n{traceback.format_exc()}")
            file.flush()
            os._exit(1)  # the others may wait for this process: no farewell
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
