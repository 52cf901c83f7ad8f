"""Other people's trainers: Hugging Face's, Lightning's, and loops with accelerate.

Training, and going on after an interruption bit for bit; saving, merging and a plain model; the trainers' options; and
what is said where something can't work.
"""

import importlib
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from lightning import LightningModule
from lightning import Trainer as LightningTrainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import adapterzoo as az
from adapterzoo import MAP, AdaLoRA, DoRA, LoRA
from adapterzoo.errors import TrainingError, UnattendedWarning, UninitialisedError
from adapterzoo.training import huggingface as az_hf
from adapterzoo.training import lightning as az_lightning

ALLOCATED = AdaLoRA(r=4, alpha=6, target_r=2, t_final=2)
DEEP = MAP(DoRA(AdaLoRA(r=4, alpha=6, target_r=2, t_init=1, t_final=2, dropout=0.1)))
SPECS = [DoRA(LoRA(r=2, alpha=6)), ALLOCATED, DEEP]
STEPS = 6


def kept(model):
    return sum(az.ranks(model).values())


def target(model):
    """The ranks that a schedule ends with."""
    return sum(layer.adapter.generator.spec.target_r for layer in az.adapted_layers(model).values())


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def perturbed(model, seed):
    """Every number that trains, away from its start."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


def differing(one, other):
    """Names of the numbers in which two state dicts are not equal bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not one[name].equal(other[name])]


def assert_same_memory(one, other):
    """Two optimisers remember the same, bit for bit, adapterzoo's share of it included."""
    one, other = one.state_dict(), other.state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for index, state in one["state"].items():
        assert not differing(state, other["state"][index])


# Hugging Face's Trainer


def bert(seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def adapted(spec, seed=0, model=None):
    model = model or bert(seed)
    az.adapt(model, spec, train=["classifier"])
    return perturbed(model, seed)


def sentences(count=24, seed=1):
    draw = torch.Generator().manual_seed(seed)
    texts = torch.randint(0, 64, (count, 12), generator=draw)
    return [{"input_ids": text, "labels": index % 3} for index, text in enumerate(texts)]


IDS = torch.stack([sentence["input_ids"] for sentence in sentences(5, seed=2)])


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def arguments(folder, **options):
    default = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "save_strategy": "no", "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "seed": 3,
    }  # fmt: skip
    return TrainingArguments(**default | options)


def trainer_of(model, folder, callbacks=None, data=None, **options):
    callbacks = [az_hf.Attach()] if callbacks is None else callbacks
    return Trainer(
        model, arguments(folder, **options), train_dataset=sentences() if data is None else data, callbacks=callbacks,
        eval_dataset=sentences(6, seed=4),
    )  # fmt: skip


def attachment(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, az_hf.Attach)).attachment


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """For every spec: a trainer that ran to the end, with checkpoints of the steps 2 and 4, and its starting point."""
    runs = {}

    def run(spec):
        if spec not in runs:
            folder = tmp_path_factory.mktemp("hf")
            trainer = trainer_of(adapted(spec), folder, save_strategy="steps", save_steps=2)
            trainer.train()
            runs[spec] = trainer, folder
        return runs[spec]

    return run


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_hf_resumes_bit_for_bit(uninterrupted, tmp_path, spec, step):
    whole, folder = uninterrupted(spec)
    start = trained(adapted(spec))
    assert set(differing(start, trained(whole.model))) == set(start)
    other_start = adapted(spec, seed=5)  # all that differs has to come from the checkpoint
    resumed = trainer_of(other_start, tmp_path, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert not differing(whole.model.state_dict(), resumed.model.state_dict())
    assert_same_memory(whole.optimizer, resumed.optimizer)
    assert attachment(resumed).step == attachment(whole).step == STEPS
    if spec in (ALLOCATED, DEEP):
        assert kept(whole.model) == target(whole.model) < 4 * len(az.ranks(whole.model))


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_hf_saves_all_of_an_adapted_model_and_a_plain_one(uninterrupted, tmp_path, spec):
    trainer, _ = uninterrupted(spec)
    expected = logits(trainer.model)
    trainer.save_model(tmp_path / "adapted")
    file = load_file(tmp_path / "adapted" / "model.safetensors")
    assert not differing(file, trainer.model.state_dict())
    again = adapted(spec, seed=5)
    again.load_state_dict(file)
    assert logits(again).equal(expected)

    az.merge(again)
    torch.testing.assert_close(logits(again), expected)
    again.save_pretrained(tmp_path / "merged")  # a file does not depend on whether the model was merged
    assert not differing(file, load_file(tmp_path / "merged" / "model.safetensors"))

    az.unload(again, merge=True).save_pretrained(tmp_path / "plain")
    plain, report = BertForSequenceClassification.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(report.values()), report
    assert plain.state_dict().keys() == bert().state_dict().keys()
    assert not any(type(module).__module__.startswith("adapterzoo") for module in plain.modules())
    torch.testing.assert_close(logits(plain), expected)


def test_hf_from_pretrained_knows_no_adapters(uninterrupted, tmp_path):
    trainer, _ = uninterrupted(DEEP)
    trainer.save_model(tmp_path)
    base = BertForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad(), az.disabled(trainer.model):
        assert logits(base).equal(logits(trainer.model))

    class Adapted(BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            az.adapt(self, DEEP, train=["classifier"])

    with pytest.raises(UninitialisedError, match="holds no values yet"):
        logits(Adapted.from_pretrained(tmp_path))


def test_hf_saves_a_compacted_model(uninterrupted, tmp_path):
    trainer, _ = uninterrupted(ALLOCATED)
    model = adapted(ALLOCATED, seed=5)
    model.load_state_dict(trainer.model.state_dict())
    expected = logits(model)
    az.compact(model)
    assert model.num_parameters() < trainer.model.num_parameters()
    model.save_pretrained(tmp_path)
    again = adapted(ALLOCATED, seed=6)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert again.num_parameters() == model.num_parameters()
    torch.testing.assert_close(logits(again), expected)


OPTIONS = {
    "accumulated": {"gradient_accumulation_steps": 2},
    "clipped": {"max_grad_norm": 0.01},
    "not clipped": {"max_grad_norm": 0.0},
    "bf16": {"bf16": True},
    "smoothed labels": {"label_smoothing_factor": 0.1},
    "noisy embeddings": {"neftune_noise_alpha": 5.0},
    "weight decay": {"weight_decay": 0.1},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 1},
    "plain AdamW": {"optim": "adamw_torch"},
    "Adafactor": {"optim": "adafactor"},
    "epochs": {"max_steps": -1, "num_train_epochs": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_hf_trains_with_its_options(tmp_path, options):
    model = adapted(DEEP)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(model, tmp_path, **options)
    trainer.train()
    moved = set(differing(state, model.state_dict()))
    masks = {name for name in state if name.endswith(".mask")}
    assert moved - masks == set(trained(model))
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert attachment(trainer).step == STEPS == trainer.state.global_step
    assert kept(model) == target(model)


def test_hf_trains_sixteen_bit_weights_with_a_float32_adapter(tmp_path):
    model = adapted(DEEP, model=bert().bfloat16())
    trainer_of(model, tmp_path).train()
    layer = model.bert.encoder.layer[0].output.dense
    assert layer.weight.dtype is torch.bfloat16
    assert {p.dtype for p in layer.adapter.parameters()} == {torch.float32}
    assert kept(model) == target(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_hf_checkpointed_activations_change_no_bit(uninterrupted, tmp_path, reentrant):
    whole, _ = uninterrupted(DEEP)
    model = adapted(DEEP)
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer_of(model, tmp_path, **options).train()
    assert not differing(whole.model.state_dict(), model.state_dict())


def test_hf_evaluates_the_model_as_it_is_in_the_middle_of_training(tmp_path):
    # Factors are kept between calls without gradients: none may be those of an earlier step.
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(adapted(DEEP), tmp_path, **options)
    trainer.train()
    seen = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert len(set(seen.values())) == len(seen) == 3
    for step, loss in seen.items():
        model = adapted(DEEP, seed=5)
        model.load_state_dict(load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors"))
        assert trainer_of(model, tmp_path).evaluate()["eval_loss"] == loss


def test_hf_decays_magnitudes_unless_groups_say_otherwise(tmp_path):
    model = adapted(MAP(LoRA(r=2)))
    magnitudes = {id(p) for n, p in model.named_parameters() if n.endswith((".alpha", ".beta"))}

    def decays(optimizer):
        pairs = [(id(p), group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
        return {decay for key, decay in pairs if key in magnitudes}

    own = trainer_of(model, tmp_path, weight_decay=0.1)
    assert decays(own.create_optimizer()) == {0.1}
    optimizer = torch.optim.AdamW(az.param_groups(model, lr=1e-2, weight_decay=0.1))
    trainer = Trainer(
        model, arguments(tmp_path, weight_decay=0.1), train_dataset=sentences(), optimizers=(optimizer, None),
        callbacks=[az_hf.Attach()],
    )  # fmt: skip
    trainer.train()
    assert decays(trainer.optimizer) == {0.0}
    assert attachment(trainer).optimizer is optimizer


def test_hf_changes_nothing_where_no_piece_needs_anything(uninterrupted, tmp_path):
    whole, _ = uninterrupted(SPECS[0])
    model = adapted(SPECS[0])
    trainer_of(model, tmp_path, callbacks=[]).train()
    assert not differing(whole.model.state_dict(), model.state_dict())


UNPENALISED = ALLOCATED.model_copy(update={"orth_weight": 0.0})


def test_hf_leaves_the_penalty_to_the_loss_if_told_so(tmp_path):
    model, without = adapted(ALLOCATED), adapted(UNPENALISED)
    trainer_of(model, tmp_path, callbacks=[az_hf.Attach(add_penalty=False)]).train()
    trainer_of(without, tmp_path).train()
    assert not differing(model.state_dict(), without.state_dict())


def test_hf_without_the_line_keeps_all_ranks_and_a_warning_says_so(tmp_path):
    model = adapted(ALLOCATED)
    with pytest.warns(UnattendedWarning, match="stay as they are"):
        trainer_of(model, tmp_path, callbacks=[]).train()
    assert kept(model) == 4 * len(az.ranks(model))


def test_hf_loads_the_best_model_with_its_own_ranks(tmp_path):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1}
    model = adapted(ALLOCATED)
    trainer = trainer_of(model, tmp_path, eval_steps=1, **options)
    losses = iter([5.0, 1.0, 4.0, 3.0, 2.0, 2.0])  # step 2 is the best
    own = trainer.evaluate
    trainer.evaluate = lambda *a, **k: own(*a, **k) | {"eval_loss": next(losses)}
    with pytest.warns(UserWarning, match="the model is that of step 2 of 6"):
        trainer.train()
    assert not differing(model.state_dict(), load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    assert kept(model) > target(model)


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.act(control)


def stop(control):
    control.should_training_stop = True


def interrupt(control):
    raise KeyboardInterrupt


def test_hf_says_so_if_training_ends_early(tmp_path):
    trainer = trainer_of(adapted(ALLOCATED), tmp_path, callbacks=[az_hf.Attach(), At(3, stop)])
    with pytest.warns(UserWarning, match="the model is that of step 3 of 6, at which its ranks were not final"):
        trainer.train()


def test_hf_starts_anew_after_an_interruption(tmp_path):
    model = adapted(ALLOCATED)
    for _ in range(2):  # a cell that is run again makes a new trainer
        trainer = trainer_of(model, tmp_path, callbacks=[az_hf.Attach(), At(2, interrupt)])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    last = trainer_of(model, tmp_path)
    last.train()
    assert kept(model) == target(model)
    assert attachment(last).step == STEPS
    az.attach(model, last.optimizer, total_steps=2 * STEPS)  # an error, were the last one still there


def test_hf_reports_what_cannot_be_attached(tmp_path):
    with pytest.raises(TrainingError, match="BertForSequenceClassification has no adapted layer"):
        trainer_of(bert(), tmp_path).train()
    with pytest.raises(TrainingError, match="t_init=5 and t_final=3 leave none of 6 steps"):
        trainer_of(adapted(AdaLoRA(r=4, target_r=2, t_init=5, t_final=3)), tmp_path).train()
    model = adapted(ALLOCATED)
    az.merge(model)
    with pytest.raises(TrainingError, match="is merged"):
        trainer_of(model, tmp_path).train()


class Stream(IterableDataset):
    """Examples without a number of them."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def test_hf_knows_its_steps_or_says_so_itself(tmp_path):
    stream = Stream(sentences())
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        trainer_of(adapted(ALLOCATED), tmp_path, data=stream, max_steps=-1)
    model = adapted(ALLOCATED)
    trainer_of(model, tmp_path, data=stream).train()
    assert kept(model) == target(model)
    trainer = trainer_of(adapted(ALLOCATED), tmp_path, max_steps=-1, num_train_epochs=0)
    trainer.train()
    assert attachment(trainer) is None


def test_hf_a_longer_second_training_ends_at_the_same_ranks(uninterrupted, tmp_path):
    _, folder = uninterrupted(ALLOCATED)
    model = adapted(ALLOCATED, seed=5)
    longer = trainer_of(model, tmp_path, max_steps=9, save_strategy="steps", save_steps=2)
    longer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert attachment(longer).step == 9
    assert kept(model) == target(model)


def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    return ViTForImageClassification(config)


def pictures():
    draw = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 8, 8, generator=draw), "labels": index % 3} for index in range(24)]


REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}


def test_hf_says_so_if_reentrant_checkpointing_cuts_the_adapters_off(tmp_path):
    # Transformers makes the embeddings of texts want a gradient, not those of pictures.
    trainer = trainer_of(adapted(DEEP, model=vit()), tmp_path, data=pictures(), **REENTRANT)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")  # torch's own hint
        with pytest.raises(TrainingError, match=r"adapters of 12 layers: .*enable_input_require_grads"):
            trainer.train()


def test_hf_reentrant_checkpointing_of_pictures_works_as_the_message_says(tmp_path):
    whole, model = adapted(DEEP, model=vit()), adapted(DEEP, model=vit())
    trainer_of(whole, tmp_path, data=pictures()).train()
    model.enable_input_require_grads()
    trainer_of(model, tmp_path, data=pictures(), **REENTRANT).train()
    assert not differing(whole.state_dict(), model.state_dict())


# Lightning


# Lightning 2.6 uses a name of torch that torch 2.13 deprecates; counts the workers of data loaders; and asks for the
# callback that wrote a checkpoint when going on from it.
lightning = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
]


def with_lightning(test):
    for mark in lightning:
        test = mark(test)
    return test


class Module(LightningModule):
    """A user's module. `rhythm`: manual optimisation with a step after so many batches."""

    def __init__(self, spec=ALLOCATED, seed=0, rhythm=None):
        super().__init__()
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3))
        if spec is not None:
            az.adapt(self.model, spec, train=["4"])
            perturbed(self.model, seed)
        self.rhythm, self.automatic_optimization = rhythm, rhythm is None

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        if self.rhythm is not None:
            self.manual_backward(loss)
            if (index + 1) % self.rhythm == 0:
                self.optimizers().step()
                self.optimizers().zero_grad()
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(az.param_groups(self.model, lr=1e-2))


_DRAW = torch.Generator().manual_seed(0)
FEATURES, LABELS = torch.randn(24, 12, generator=_DRAW), torch.randint(0, 3, (24,), generator=_DRAW)


def fit(module, folder, *callbacks, data=None, checkpoint=None, **options):
    default = {
        "default_root_dir": folder, "max_epochs": 2, "accelerator": "cpu", "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    trainer = LightningTrainer(**default | options, callbacks=list(callbacks))
    data = DataLoader(TensorDataset(FEATURES, LABELS), batch_size=4) if data is None else data
    trainer.fit(module, data, ckpt_path=checkpoint)
    return trainer


@with_lightning
@pytest.mark.parametrize("spec", [SPECS[0], ALLOCATED, DEEP.model_copy(update={"inner": DoRA(ALLOCATED)})], ids=repr)
def test_lightning_trains_resumes_bit_for_bit_and_merges(tmp_path, spec):
    whole, start, attach = Module(spec), trained(Module(spec)), az_lightning.Attach()
    every = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
    done = fit(whole, tmp_path, attach, every, enable_checkpointing=True)
    assert set(differing(start, trained(whole))) == set(start)
    resumed = Module(spec, seed=5)
    again = fit(resumed, tmp_path, az_lightning.Attach(), checkpoint=tmp_path / "epoch=0.ckpt")
    assert not differing(whole.state_dict(), resumed.state_dict())
    assert_same_memory(done.optimizers[0], again.optimizers[0])
    assert attach.attachment.step == attach.attachment.total_steps == 12
    if spec is not SPECS[0]:
        assert kept(whole) == target(whole) == 4

    loaded = Module.load_from_checkpoint(tmp_path / "epoch=1.ckpt", spec=spec, seed=6, map_location="cpu")
    with torch.no_grad():
        expected = loaded.model(FEATURES)
        assert expected.equal(whole.model(FEATURES))
        az.unload(loaded, merge=True)
        torch.testing.assert_close(loaded.model(FEATURES), expected)
    assert type(loaded.model[0]) is nn.Linear


LIGHTNING_OPTIONS = {
    "accumulated": ({"accumulate_grad_batches": 2}, 6),
    "clipped": ({"gradient_clip_val": 0.01}, 12),
    "bf16-mixed": ({"precision": "bf16-mixed"}, 12),
    "bf16-true": ({"precision": "bf16-true"}, 12),
    "max_steps": ({"max_steps": 7}, 7),
    "only max_steps": ({"max_epochs": -1, "max_steps": 9}, 9),
}


@with_lightning
@pytest.mark.parametrize(("options", "steps"), LIGHTNING_OPTIONS.values(), ids=LIGHTNING_OPTIONS)
def test_lightning_trains_with_its_options(tmp_path, options, steps):
    module, attach = Module(MAP(DoRA(ALLOCATED))), az_lightning.Attach()
    start = trained(module)
    trainer = fit(module, tmp_path, attach, **options)
    assert set(differing(start, trained(module))) == set(start)
    assert {p.dtype for layer in az.adapted_layers(module).values() for p in layer.adapter.parameters()} == {
        torch.float32
    }
    assert attach.attachment.step == attach.attachment.total_steps == trainer.global_step == steps
    assert kept(module) == target(module)


@with_lightning
def test_lightning_leaves_the_penalty_to_the_loss_if_told_so(tmp_path):
    module, without = Module(ALLOCATED), Module(UNPENALISED)
    fit(module, tmp_path, az_lightning.Attach(add_penalty=False))
    fit(without, tmp_path, az_lightning.Attach())
    assert not differing(module.state_dict(), without.state_dict())


@with_lightning
def test_lightning_manual_optimisation(tmp_path):
    module, attach = Module(rhythm=1), az_lightning.Attach()
    fit(module, tmp_path, attach)
    assert kept(module) == target(module)

    wide = AdaLoRA(r=8, target_r=2)
    module = Module(wide, rhythm=2)
    with pytest.warns(UserWarning, match=r"training ended after 6 of 12 steps.*Attach\(total_steps=...\)"):
        fit(module, tmp_path, az_lightning.Attach())
    assert kept(module) > target(module)

    module = Module(wide, rhythm=2)
    fit(module, tmp_path, az_lightning.Attach(total_steps=6))
    assert kept(module) == target(module)


class Two(Module):
    """Manual optimisation with two optimisers; `own`: how many of the trained parameters the first one holds."""

    def __init__(self, own=None):
        super().__init__(rhythm=1)
        self.own, self.other = own, nn.Linear(12, 1)

    def training_step(self, batch, index):
        self.manual_backward(nn.functional.cross_entropy(self.model(batch[0]), batch[1]) + self.other(batch[0]).mean())
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        rest = parameters[len(parameters) if self.own is None else self.own :]
        own = [p for p in parameters if all(p is not q for q in rest)]
        return [torch.optim.SGD([*self.other.parameters(), *rest], lr=1e-2), torch.optim.AdamW(own, lr=1e-2)]


@with_lightning
def test_lightning_several_optimisers(tmp_path):
    with pytest.raises(TrainingError, match=r"there are 2 optimisers.*Attach\(total_steps=...\)"):
        fit(Two(), tmp_path, az_lightning.Attach())
    module, attach = Two(), az_lightning.Attach(total_steps=12)
    trainer = fit(module, tmp_path, attach)
    assert attach.attachment.optimizer is trainer.optimizers[1]
    assert kept(module) == target(module)
    with pytest.raises(TrainingError, match="gave 2 optimisers, and 2 of them hold adapters"):
        fit(Two(own=2), tmp_path, az_lightning.Attach(total_steps=12))


@with_lightning
def test_lightning_reports_what_cannot_be_attached(tmp_path):
    stream = DataLoader(Stream(list(zip(FEATURES, LABELS, strict=True))), batch_size=4)
    endless = r"no end that Lightning knows of.*Attach\(total_steps=...\) or Trainer\(max_steps=...\)"
    with pytest.raises(TrainingError, match=endless):
        fit(Module(), tmp_path, az_lightning.Attach(), data=stream)
    with pytest.raises(TrainingError, match=endless):
        fit(Module(), tmp_path, az_lightning.Attach(), max_epochs=-1, max_time="00:00:01:00")
    with pytest.raises(TrainingError, match="Module has no adapted layer"):
        fit(Module(spec=None), tmp_path, az_lightning.Attach())


@with_lightning
def test_lightning_starts_anew_after_an_error(tmp_path):
    module = Module()
    own, module.training_step = module.training_step, lambda batch, batch_idx: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(module, tmp_path, az_lightning.Attach())
    module.training_step = own
    trainer = fit(module, tmp_path, az_lightning.Attach())
    assert kept(module) == target(module)
    az.attach(module, trainer.optimizers[0], total_steps=24)  # an error, were the last one still there


# Accelerate


def accelerated(spec, *, before=False, precision="no", accumulate=1, save=None, load=None, seed=0, epochs=2):
    """A loop with accelerate, six batches an epoch; saves or loads between its two epochs."""
    AcceleratorState._reset_state(reset_partial_state=True)  # one a process, unless it is reset
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate)
    set_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 3))
    az.adapt(model, spec, train=["3"])
    perturbed(model, seed)
    start = trained(model)
    optimizer = torch.optim.AdamW(az.param_groups(model, lr=1e-2))
    total = 6 * epochs // accumulate
    if before:
        attachment = az.attach(model, optimizer, total_steps=total)
    loader = DataLoader(TensorDataset(FEATURES, LABELS), batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if not before:
        attachment = az.attach(model, optimizer, total_steps=total)
    set_seed(7)
    if load:
        accelerator.load_state(load)
    for epoch in range(1 if load else 0, epochs):
        for features, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(features), labels))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        if save and epoch == 0:
            accelerator.save_state(save)
    attachment.detach()
    return accelerator.unwrap_model(model, keep_fp32_wrapper=False), optimizer, attachment, start


@pytest.mark.parametrize("before", [False, True], ids=["after prepare", "before prepare"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("spec", [ALLOCATED, DEEP], ids=repr)
def test_accelerate_resumes_bit_for_bit(tmp_path, spec, precision, before):
    options = {"precision": precision, "before": before}
    whole, optimizer, attachment, start = accelerated(spec, save=tmp_path / "state", **options)
    assert set(differing(start, trained(whole))) == set(start)
    resumed, other, again, _ = accelerated(spec, load=tmp_path / "state", seed=5, **options)
    assert not differing(whole.state_dict(), resumed.state_dict())
    assert_same_memory(optimizer, other)
    assert attachment.step == again.step == 12
    assert kept(whole) == target(whole)
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    expected = whole.eval()(FEATURES)
    az.unload(whole, merge=True)
    torch.testing.assert_close(whole(FEATURES), expected)


def test_accelerate_counts_optimiser_steps_not_batches():
    model, _, attachment, start = accelerated(ALLOCATED, accumulate=2)
    assert attachment.step == 6
    assert set(differing(start, trained(model))) == set(start)
    assert kept(model) == target(model)


# The extra


@pytest.mark.parametrize(("module", "package"), [("huggingface", "transformers"), ("lightning", "lightning")])
def test_a_trainer_that_is_not_installed_is_named_with_its_extra(monkeypatch, module, package):
    name = f"adapterzoo.training.{module}"
    monkeypatch.delitem(sys.modules, name)
    for loaded in [key for key in sys.modules if key.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{name} serves .* needs .*{package}.*pip install 'adapterzoo\[trainers\]'"):
        importlib.import_module(name)


def resumed_like_trainer(model, folder):
    """What Trainer does with a checkpoint: save_pretrained, then load_state_dict without strictness."""
    model.save_pretrained(folder)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    begin = SimpleNamespace(global_step=2, max_steps=4)
    az_hf.Attach().on_train_begin(None, begin, None, model=model, optimizer=optimizer)


def test_hf_a_checkpoint_that_lost_the_adapters_is_an_error_by_name(tmp_path):
    """Transformers saves a ViT under other names than the model's, and its Trainer reads them without translating."""
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    model = ViTForImageClassification(config)
    az.adapt(model, LoRA(r=2), exclude=["classifier"])
    lost = r"would start anew: [\s\S]*layers.0.attention.q_proj[\s\S]*save_original_format"
    with pytest.raises(TrainingError, match=lost):
        resumed_like_trainer(model, tmp_path)
    resumed_like_trainer(adapted(LoRA(r=2)), tmp_path)
