"""The task `hf`: models of three architectures with random weights, and data in GLUE's formats, all made here."""

import argparse
import ast
import importlib
import importlib.util
import json
import math
import pathlib
import re
import shutil
import threading
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers as tf
from scipy import stats
from sklearn import metrics
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import adapterzoo.ablation.tasks.hf
from adapterzoo import MAP, DoRA, LoRA, adapt
from adapterzoo.ablation.docstrings import pairs_of, unrepeated
from adapterzoo.ablation.grids.cells import cells
from adapterzoo.ablation.grids.checking import check
from adapterzoo.ablation.grids.outline import Outline
from adapterzoo.ablation.tasks.hf import builtin, sources
from adapterzoo.ablation.tasks.hf import models as hf_models
from adapterzoo.ablation.tasks.hf.heads import head_names
from adapterzoo.ablation.tasks.hf.kinds import look_at_answers, look_at_choices, together
from adapterzoo.ablation.tasks.hf.measures import of_classes, of_numbers
from adapterzoo.ablation.tasks.hf.models import Named
from adapterzoo.ablation.tasks.hf.parts import classes_of, parts_of
from adapterzoo.ablation.tasks.hf.places import place_of
from adapterzoo.ablation.tasks.hf.presets import GLUE, PRESETS
from adapterzoo.ablation.tasks.hf.rows import rows_of
from adapterzoo.ablation.tasks.hf.sources import Source
from adapterzoo.ablation.tasks.hf.task import HF
from adapterzoo.ablation.tasks.hf.tokenizer import tokenizer_of
from adapterzoo.ablation.tasks.hf.training import Clipped
from adapterzoo.ablation.tasks.registry import make_task
from adapterzoo.ablation.tasks.task import Run, Scores, columns
from adapterzoo.errors import GridError, MissingPackageError, TrainingError
from adapterzoo.streams import stream

GOOD, BAD = ("fine", "lovely", "bright"), ("awful", "dull", "grim")
FILLING = ("the", "film", "was", "a", "story", "of", "people", "and", "town", "null", "NA", "true", "false")
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
         "initializer_range": 0.2}  # fmt: skip
V3 = {"relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
      "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0}  # fmt: skip
LINEAR_LAYERS = {"bert": 7, "deberta": 6, "llama": 7}
HEADS = {"bert": ("classifier",), "deberta": ("pooler", "classifier"), "llama": ("score",)}
LABELS = {name: PRESETS[name].options["labels"] for name in GLUE}


def _tokenizer(types):
    words = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "/", ":", *GOOD, *BAD, *FILLING, "answer", "format", "is", "it", "?"]
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    found.normalizer = normalizers.Lowercase()
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", pair="[BOS] $A [EOS]:0 $B:1", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    special = {"unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    inputs = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    return tf.PreTrainedTokenizerFast(tokenizer_object=found, model_input_names=inputs, **special)


def _model(name, vocabulary):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "bert":
            return tf.BertModel(tf.BertConfig(**SHAPE, vocab_size=vocabulary))
        if name == "deberta":
            return tf.DebertaV2Model(tf.DebertaV2Config(**SHAPE, **V3, vocab_size=vocabulary))
        return tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE, vocab_size=vocabulary, bos_token_id=2, eos_token_id=3))


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """A folder for each of three models, with weights and tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for name in LINEAR_LAYERS:
        tokenizer = _tokenizer(types=name == "bert")
        tokenizer.save_pretrained(root / name)
        _model(name, len(tokenizer)).save_pretrained(root / name)
    return root


def _sentence(draw, good, length=5):
    words = [FILLING[i] for i in torch.randint(len(FILLING), (length,), generator=draw).tolist()]
    mood = GOOD if good else BAD
    words.insert(int(torch.randint(length, (), generator=draw)), mood[int(torch.randint(3, (), generator=draw))])
    return " ".join(words)


def _rows(name, count, key):
    """Rows in the columns of a task of GLUE; what is fine or awful decides the label."""
    draw, found = stream(name, key), []
    for number in range(count):
        good = number % 2 == 0
        texts = {column: _sentence(draw, good, 3 + number % 4) for column in PRESETS[name].options["text"]}
        found.append({**texts, "label": _label(name, number, good), "idx": number})
    return found


def _label(name, number, good):
    if name == "stsb":
        return 1.0 + 2.5 * good + (number % 7) / 10
    return (number % 3) if name == "mnli" else int(good)


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = datasets.Dataset.from_list(rows)
    if path.suffix == ".parquet":
        data.to_parquet(path)
    elif path.suffix == ".jsonl":
        data.to_json(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        data.to_csv(path)
    else:
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")


ENDINGS = dict(zip(GLUE, ("parquet", "tsv", "csv", "json", "jsonl", "tsv", "csv", "json"), strict=True))


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """Every task of GLUE, in all the kinds of file."""
    root = tmp_path_factory.mktemp("glue")
    for name, preset in PRESETS.items():
        for split in ["train", *preset.tests.values()] if name in GLUE else []:
            _write(root / name / f"{split}.{ENDINGS[name]}", _rows(name, 60 if split == "train" else 20, split))
    return root


def _task(backbones, glue, name="sst2", model="bert", **options):
    told = {"steps": 3, "looks": 1, "batch": 8, **options}
    return HF(backbone=str(backbones / model), dataset=name, data=str(glue), **told)


def _shared(task, folder):
    folder.mkdir(exist_ok=True)
    task.prepare(folder)
    return task.load(folder)


def _run(task, shared, spec=None, seed=0, test=True, log=lambda step, told: None):
    return task.run(Run(spec, seed, shared, torch.device("cpu"), test, log))


# Presets


def test_the_options_of_glue_are_those_of_the_paper():
    paper = {
        "mnli": (5e-4, 12, 256), "sst2": (8e-4, 24, 128), "cola": (8e-4, 25, 64), "qqp": (1e-3, 5, 320),
        "qnli": (5e-4, 5, 512), "rte": (1.2e-3, 50, 320), "mrpc": (1e-3, 30, 320), "stsb": (5e-4, 25, 128),
    }  # fmt: skip
    assert set(paper) == set(GLUE)
    for name, (lr, epochs, tokens) in paper.items():
        task = HF(backbone="x", dataset=name)
        assert (task.lr, task.epochs, task.tokens) == (lr, epochs, tokens)
        assert (task.batch, task.warmup, task.schedule, task.targets) == (32, 0.1, "linear", "all-linear")


def test_the_options_of_commonsense_are_those_of_the_paper():
    task = HF(backbone="x", dataset="commonsense", data="y")
    assert (task.lr, task.epochs, task.batch, task.warmup_steps) == (3e-4, 3, 16, 100)
    assert (task.schedule, task.dtype, task.tokens) == ("linear", "bfloat16", 256)
    assert task.targets == ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    assert task.settled(170_000).steps == 3 * 10_625
    assert round(task.settled(170_000).warmup * task.settled(170_000).steps) == 100


def test_what_a_grid_says_goes_over_a_preset_and_steps_take_the_place_of_epochs():
    task = HF(backbone="x", dataset="rte", lr=1e-2, steps=7)
    assert (task.lr, task.steps, task.epochs, task.tokens) == (1e-2, 7, None, 320)
    again = make_task({"name": "hf", **task.model_dump()})
    assert again == task
    assert HF(backbone="x", dataset="commonsense", data="y", warmup=0.2).warmup_steps is None


def test_epochs_come_to_steps_that_count_a_last_smaller_batch():
    task = HF(backbone="x", dataset="d", batch=8, epochs=2.5)
    assert task.settled(60).steps == 20
    assert task.settled(1).steps == 2
    assert HF(backbone="x", dataset="d", steps=7).settled(60).steps == 7


@pytest.mark.parametrize("name", GLUE)
def test_every_task_of_glue_runs_and_its_score_is_its_measure(name, backbones, glue, tmp_path):
    task = _task(backbones, glue, name)
    shared = _shared(task, tmp_path / "p")
    found = _run(task, shared, LoRA(r=2))
    true = shared.tests[""].values["labels"]
    told, predicted = found.metrics, found.examples["predicted"]
    split = "validation_matched" if name == "mnli" else "validation"
    assert found.examples["id"].tolist() == [f"{split}/{i}" for i in range(20)]
    if name == "stsb":
        assert told["test/score"] == told["test/pearson"] == pytest.approx(stats.pearsonr(predicted, true)[0])
        assert told["test/spearman"] == pytest.approx(stats.spearmanr(predicted, true)[0])
        assert found.examples["score"].tolist() == pytest.approx((-((predicted - true) ** 2)).tolist())
        return
    assert told["test/accuracy"] == np.mean(predicted == true) == np.mean(found.examples["score"])
    assert told["test/matthews"] == pytest.approx(metrics.matthews_corrcoef(true, predicted))
    average = "macro" if name == "mnli" else "binary"
    assert told["test/f1"] == pytest.approx(metrics.f1_score(true, predicted, average=average, zero_division=0))
    assert told["test/score"] == told["test/matthews" if name == "cola" else "test/accuracy"]
    assert ("test/accuracy_mismatched" in told) == (name == "mnli")


def test_the_mismatched_set_of_mnli_is_scored_beside_the_matched_one(backbones, glue, tmp_path):
    task = _task(backbones, glue, "mnli")
    shared = _shared(task, tmp_path / "p")
    model = task.model(shared, 0).eval()
    with torch.no_grad():
        both = task.scores(model, shared, "test", 0).metrics
        alone = (
            task.model_copy(update={"steps": 1})
            .scores(
                model,
                type(shared)(shared.base, shared.train, shared.validation, {"": shared.tests["mismatched"]}),
                "test",
                0,
            )
            .metrics
        )
    assert both["accuracy_mismatched"] == alone["accuracy"]
    assert both["loss_mismatched"] == alone["loss"] != both["loss"]


# Parts and files


def test_the_test_part_of_glue_is_its_validation_set_and_the_validation_part_comes_off_the_training_rows(glue):
    parts = parts_of(Source("rte", data=str(glue)), None, 1000, None)
    assert set(parts.tests[""].names) == {f"validation/{i}" for i in range(20)}
    assert len(parts.validation.names) == 6  # a tenth of 60
    assert {*parts.train.names, *parts.validation.names} == {f"train/{i}" for i in range(60)}
    assert not set(parts.train.names) & set(parts.validation.names)
    again = parts_of(Source("rte", data=str(glue)), 10, 3, 5)
    assert (len(again.train.names), len(again.validation.names), len(again.tests[""].names)) == (10, 3, 5)
    assert set(again.validation.names) <= set(parts.validation.names)


def test_one_file_is_dealt_out_into_three_parts(tmp_path):
    _write(tmp_path / "all.csv", [{"text": f"film {i}", "label": i % 2} for i in range(50)])
    parts = parts_of(Source(str(tmp_path / "all.csv")), None, 1000, None)
    named = [set(part.names) for part in (parts.tests[""], parts.validation, parts.train)]
    assert [len(names) for names in named] == [10, 4, 36]
    assert len(set.union(*named)) == 50


def test_a_data_set_with_three_splits_keeps_them(tmp_path):
    for split, count in (("train", 20), ("dev", 6), ("test", 8)):
        _write(tmp_path / f"{split}.jsonl", [{"text": f"{split} {i}", "label": i % 2} for i in range(count)])
    parts = parts_of(Source(str(tmp_path)), None, 1000, None)
    assert [set(part.column("text")) for part in (parts.train, parts.validation, parts.tests[""])] == [
        {f"{split} {i}" for i in range(count)} for split, count in (("train", 20), ("dev", 6), ("test", 8))
    ]
    (tmp_path / "test.jsonl").unlink()
    without = parts_of(Source(str(tmp_path)), None, 1000, None)
    assert set(without.tests[""].column("text")) == {f"dev {i}" for i in range(6)}
    assert len(without.validation.names) == 2
    assert len(without.train.names) == 18


def test_every_kind_of_file_gives_the_same_rows(backbones, tmp_path):
    rows = {split: _rows("rte", count, split) for split, count in (("train", 30), ("validation", 8))}
    for ending in ("csv", "tsv", "json", "jsonl", "parquet"):
        for split, some in rows.items():
            _write(tmp_path / ending / "rte" / f"{split}.{ending}", some)
    _write(tmp_path / "shards/rte/train-00000-of-00002.parquet", rows["train"][:17])
    _write(tmp_path / "shards/rte/train-00001-of-00002.parquet", rows["train"][17:])
    _write(tmp_path / "shards/rte/validation-00000-of-00001.parquet", rows["validation"])
    saved = datasets.DatasetDict({split: datasets.Dataset.from_list(some) for split, some in rows.items()})
    saved.save_to_disk(tmp_path / "saved/rte")
    named = {split: [{**row, "label": LABELS["rte"][row["label"]]} for row in some] for split, some in rows.items()}
    for split, some in named.items():
        _write(tmp_path / "named/rte" / f"{split.replace('validation', 'dev')}.tsv", some)
    found = {}
    for kind in ("csv", "tsv", "json", "jsonl", "parquet", "shards", "saved", "named"):
        task = _task(backbones, tmp_path / kind, "rte")
        (folder := tmp_path / f"prepared-{kind}").mkdir()
        task.prepare(folder)
        found[kind] = [dict(np.load(folder / f"{part}.npz")) for part in ("train", "validation", "test")]
    for kind, arrays in found.items():
        for mine, first in zip(arrays, found["csv"], strict=True):
            assert mine.keys() == first.keys()
            assert all(np.array_equal(mine[key], first[key]) for key in mine), kind


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_words_such_as_null_are_texts(ending, tmp_path):
    words = ["NA", "null", "None", "nan", "N/A", "true", "1e5"]
    _write(tmp_path / f"all.{ending}", [{"text": word, "label": i % 2} for i, word in enumerate(words)])
    assert Source(str(tmp_path / f"all.{ending}")).splits()["train"]["text"][:] == words


def test_classes_are_found_in_the_data(backbones, tmp_path):
    def labels(values, names, **options):
        path = tmp_path / f"{'-'.join(map(str, values))}.jsonl"
        _write(path, [{"text": "fine", "label": value} for value in values * 10])
        task = HF(backbone=str(backbones / "bert"), dataset=str(path), steps=1, **options)
        assert task._classes() == names
        assert task.model(None, 0).classifier.weight.shape[0] == len(names)
        return sorted(set(_shared(task, tmp_path / path.stem).train.values["labels"].tolist()))

    assert labels(["pos", "neg", "mixed"], ("mixed", "neg", "pos")) == [0, 1, 2]
    assert labels([10, 9, 2], ("2", "9", "10")) == [0, 1, 2]
    assert labels([1, 2], ("1", "2")) == [0, 1]
    assert labels(["b", "a"], ("b", "a"), labels=("b", "a")) == [0, 1]


def test_classes_that_a_saved_data_set_declares_keep_their_order(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a", "m"])}
    )
    rows = [{"text": "fine", "label": i % 2} for i in range(40)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    task = HF(backbone="x", dataset=str(tmp_path / "saved"))
    assert task._classes() == ("z", "a", "m")


# Heads, pairs, batches


@pytest.mark.parametrize("model", HEADS)
def test_the_new_head_is_found_by_architecture_and_trains_beside_every_linear_layer(model, backbones, glue, tmp_path):
    task = _task(backbones, glue, model=model)
    assert task.trained == HEADS[model]
    shared = _shared(task, tmp_path / "p")
    adapted = task.model(shared, 0)
    plan = adapt(adapted, LoRA(r=2), "all-linear", train=list(task.trained))
    assert len(plan.adapted) == LINEAR_LAYERS[model]
    trained = {
        name.split(".")[0] for name, p in adapted.named_parameters() if p.requires_grad and "adapter" not in name
    }
    assert trained == set(HEADS[model])


def test_roberta_electra_and_distilbert_have_heads_of_their_own():
    tiny = {"vocab_size": 30, "num_labels": 2}
    with torch.device("meta"):
        assert head_names(tf.RobertaForSequenceClassification(tf.RobertaConfig(**SHAPE, **tiny))) == ("classifier",)
        assert head_names(tf.GPT2ForSequenceClassification(tf.GPT2Config(n_embd=8, n_layer=1, n_head=2))) == ("score",)
        small = tf.DistilBertConfig(dim=8, n_layers=1, n_heads=2, hidden_dim=8, vocab_size=30)
        assert head_names(tf.DistilBertForSequenceClassification(small)) == ("pre_classifier", "classifier")


def test_a_head_comes_from_the_seed_alone_and_the_base_is_shared(backbones, glue, tmp_path):
    task = _task(backbones, glue, model="deberta")
    shared = _shared(task, tmp_path / "p")
    before = {name: value.clone() for name, value in shared.base.state_dict().items()}
    outside = torch.get_rng_state()
    first, again, other = (task.model(shared, seed) for seed in (1, 1, 2))
    assert torch.get_rng_state().equal(outside)
    for name, value in first.named_parameters():
        own = name.split(".")[0] in HEADS["deberta"]
        assert (value.data_ptr() == shared.base.get_parameter(name).data_ptr()) is not own
        assert value.equal(again.get_parameter(name))
    assert not first.classifier.weight.equal(other.classifier.weight)
    assert not first.pooler.dense.weight.equal(other.pooler.dense.weight)
    assert 0.15 < first.pooler.dense.weight.std() < 0.25  # as the architecture draws them: initializer_range
    _run(task, shared, LoRA(r=2))
    assert all(value.equal(before[name]) for name, value in shared.base.state_dict().items())


def test_cells_of_one_seed_are_pairs(backbones, glue, tmp_path):
    task = _task(backbones, glue)
    shared = _shared(task, tmp_path / "p")

    def first_loss(spec, seed):
        told = []
        _run(task, shared, spec, seed, test=False, log=lambda step, values: told.append(values.get("loss")))
        return told[1]

    losses = [first_loss(spec, 3) for spec in (None, LoRA(r=2), MAP(LoRA(r=2)), DoRA(LoRA(r=4)))]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-6)  # all start where the base stands
    assert first_loss(None, 4) != pytest.approx(losses[0], abs=1e-6)


def test_a_run_repeats_bit_for_bit_and_no_test_is_looked_at_without_leave(backbones, glue, tmp_path):
    task = _task(backbones, glue)
    shared = _shared(task, tmp_path / "p")
    first, again = (_run(task, shared, MAP(LoRA(r=2)), 5) for _ in range(2))
    kept = [{n: v for n, v in found.metrics.items() if "/" in n} for found in (first, again)]
    assert kept[0] == kept[1]
    tuned = _run(task, shared, MAP(LoRA(r=2)), 5, test=False)
    assert not any(name.startswith("test/") for name in tuned.metrics)
    assert tuned.examples["id"][0].startswith("train/")


def test_a_pass_has_every_example_once_and_an_order_of_the_seed(backbones, glue, tmp_path):
    task = _task(backbones, glue, steps=14, batch=8)
    shared = _shared(task, tmp_path / "p")
    assert len(shared.train) == 54
    sizes = [len(batch["labels"]) for batch in task.batches(shared, 0)]
    assert sizes == [8] * 6 + [6] + [8] * 6 + [6]

    def order(seed):
        return [batch["input_ids"].tolist() for batch in task.batches(shared, seed)]

    assert order(0) == order(0) != order(1)
    rows = sorted(tuple(i for i in row if i != shared.train.pad) for batch in order(0)[:7] for row in batch)
    ends = shared.train.lengths.cumsum()
    flat = shared.train.tokens["input_ids"]
    assert rows == sorted(
        tuple(flat[end - n : end].tolist()) for end, n in zip(ends, shared.train.lengths, strict=True)
    )


@pytest.mark.parametrize("model", HEADS)
def test_filling_up_changes_no_answer(model, backbones, glue, tmp_path):
    task = _task(backbones, glue, "mrpc", model=model)
    shared = _shared(task, tmp_path / "p")
    net, rows = task.model(shared, 0).eval(), shared.train
    assert ("token_type_ids" in rows.tokens) is (model == "bert")
    with torch.no_grad():
        together = task.scores(net, type(shared)(shared.base, rows, rows, {}), "validation", 0)
        order = torch.tensor([int(rows.lengths.argmin()), int(rows.lengths.argmax())])
        inputs = {name: value for name, value in rows.batch(order).items() if name in ("input_ids", "attention_mask",
                  "token_type_ids")}  # fmt: skip
        both = net(**inputs).logits
        alone = net(**{name: value[:1, : int(rows.lengths.min())] for name, value in inputs.items()}).logits
    torch.testing.assert_close(both[:1], alone, rtol=1e-5, atol=1e-6)
    assert together.examples["predicted"][int(order[0])] == alone.argmax()


def test_texts_are_cut_off_at_their_end(backbones, glue, tmp_path):
    task = _task(backbones, glue, tokens=4)
    assert _shared(task, tmp_path / "p").train.lengths.max() == 4


@pytest.mark.parametrize("clip", [1e-3, None])
def test_gradients_are_clipped_to_a_norm_or_not_at_all(clip, backbones, glue, tmp_path):
    task = _task(backbones, glue, clip=clip)
    shared = _shared(task, tmp_path / "p")
    seen = []

    class Watched(Clipped):
        def descend(self, loss, seconds=None):
            seen.append(torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm())
            super().descend(loss, seconds)

    training = Watched(task, Run(LoRA(r=2), 0, shared, torch.device("cpu"), False, lambda step, told: None))
    training.clip = task.clip
    training.step()
    assert (seen[0].item() <= 1e-3 * (1 + 1e-4)) is (clip is not None)
    clipped = _run(task.model_copy(update={"clip": 1e-12}), shared, LoRA(r=2)).metrics["validation/loss"]
    assert clipped != _run(task.model_copy(update={"clip": None}), shared, LoRA(r=2)).metrics["validation/loss"]


def test_loading_leaves_no_thread_and_no_report(backbones, glue, tmp_path, capfd):
    task = _task(backbones, glue)
    before = threading.active_count()
    bars = tf.utils.logging.is_progress_bar_enabled()
    _shared(task, tmp_path / "p")
    assert threading.active_count() == before
    assert tf.utils.logging.is_progress_bar_enabled() is bars
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "spec", "steps"), [("sst2", MAP(LoRA(r=2)), 50), ("stsb", LoRA(r=2), 100)])
def test_adapters_learn_which_words_are_kind(name, spec, steps, backbones, tmp_path):
    for split, count in (("train", 240), ("validation", 80)):
        _write(tmp_path / name / f"{split}.jsonl", _rows(name, count, split))
    task = _task(backbones, tmp_path, name, steps=steps, batch=16, lr=2e-2)
    assert _run(task, _shared(task, tmp_path / "p"), spec).metrics["test/score"] >= 0.8


@pytest.mark.parametrize("name", ["mnli", "stsb"])
def test_the_loss_of_labels_is_cross_entropy_or_the_squared_error(name, backbones, glue, tmp_path):
    task = _task(backbones, glue, name)
    shared = _shared(task, tmp_path / "p")
    batch, net = shared.train.batch(torch.tensor([0, 3, 5])), task.model(shared, 0).eval()
    with torch.no_grad():
        out = net(**{key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}).logits.double()
    rows = torch.arange(3)
    each = (out[:, 0] - batch["labels"]) ** 2 if name == "stsb" else -out.log_softmax(1)[rows, batch["labels"]]
    assert task.loss(net, batch).item() == pytest.approx(each.mean().item(), rel=1e-5)


def test_a_correlation_with_a_constant_is_zero():
    assert of_classes(np.ones(4), np.ones(4), 2) == {"accuracy": 1.0, "f1": 1.0, "matthews": 0.0}
    assert of_classes(np.zeros(4), np.array([0, 1, 0, 1]), 2) == {"accuracy": 0.5, "f1": 0.0, "matthews": 0.0}
    assert of_numbers(np.ones(4), np.arange(4.0)) == {"pearson": 0.0, "spearman": 0.0}


# Questions with answers


def _questions(count, key):
    draw = stream("questions", key)
    return [
        {
            "instruction": f"Is it {_sentence(draw, i % 2 == 0, 2 + i % 3)}? Answer format: true/false",
            "input": "", "output": "", "answer": "true" if i % 2 == 0 else "false",
        }
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def commonsense(tmp_path_factory):
    """The commonsense data in the places that they have in a clone."""
    root = tmp_path_factory.mktemp("commonsense")
    _write(root / "ft-training_set/commonsense_170k.json", _questions(240, "train"))
    for name in PRESETS["commonsense"].tests:
        _write(root / "dataset" / name / "test.json", _questions(10, name))
    return root


def _asked(backbones, commonsense, **options):
    told = {"steps": 3, "looks": 1, "template": "{prompt}\n", "dtype": "float32", "warmup": 0.1, **options}
    return HF(backbone=str(backbones / "llama"), dataset="commonsense", data=str(commonsense), **told)


def test_commonsense_is_learnt_once_and_tested_on_eight_sets(backbones, commonsense, tmp_path):
    task = _asked(backbones, commonsense, steps=80, batch=32, lr=2e-2, loss_on="answer")
    found = _run(task, _shared(task, tmp_path / "p"), MAP(LoRA(r=2)))
    told = found.metrics
    sets = [told[f"test/accuracy_{name}"] for name in PRESETS["commonsense"].tests]
    assert told["test/score"] == told["test/accuracy"] == pytest.approx(sum(sets) / 8)
    assert told["test/score"] >= 0.75  # 80 questions: four and a half standard errors above chance
    assert len(found.examples["id"]) == 80
    assert "ARC-Easy/9" in found.examples["id"].tolist()
    assert told["head_parameters"] == 0


def test_the_files_of_commonsense_may_stand_without_the_folders_of_a_clone(commonsense, tmp_path):
    shutil.copytree(commonsense / "dataset", tmp_path, dirs_exist_ok=True)
    shutil.copy(commonsense / "ft-training_set/commonsense_170k.json", tmp_path)
    assert (
        Source("commonsense", data=str(tmp_path)).fingerprint()
        == Source("commonsense", data=str(commonsense)).fingerprint()
    )


def test_a_choice_goes_to_the_answer_with_the_largest_likelihood(backbones, commonsense, tmp_path):
    task = _asked(backbones, commonsense, kind="choice")
    shared = _shared(task, tmp_path / "p")
    net, tokenizer = shared.base.eval(), tokenizer_of(str(backbones / "llama"), "main")
    rows = _questions(10, "boolq")
    with torch.no_grad():
        found = look_at_choices(net, shared.tests["boolq"])
        for row, choice, score in zip(rows, found.examples["choice"], found.examples["score"], strict=True):
            sums = []
            for answer in ("true", "false"):
                asked = tokenizer(f"{row['instruction']}\n")["input_ids"]
                whole = tokenizer(f"{row['instruction']}\nthe correct answer is {answer}")["input_ids"] + [3]
                logs = net(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
                sums.append(sum(logs[i - 1, whole[i]].item() for i in range(len(asked), len(whole))))
            assert choice == int(np.argmax(sums))
            assert score == (("true", "false")[choice] == row["answer"])


def test_exact_is_what_greedy_decoding_would_give(backbones, tmp_path):
    tokenizer, net = tokenizer_of(str(backbones / "llama"), "main"), Named(str(backbones / "llama")).load().eval()
    asked = tokenizer("is it fine ?")["input_ids"]
    given = net.generate(torch.tensor([asked]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist()
    wrong = [*given[:-1], (given[-1] + 1) % 20]
    rows = rows_of({"input_ids": [given, wrong, given[:-2]]}, {"starts": [len(asked)] * 3, "names": ["a", "b", "c"]}, 0)
    with torch.no_grad():
        assert look_at_answers(net, rows).examples["score"].tolist() == [1, 0, 1]


def test_a_task_of_exact_answers_runs(backbones, tmp_path):
    _write(tmp_path / "all.json", [{"text": f"fine {i}", "label": "a lovely town"} for i in range(40)])
    words = {"kind": "exact", "template": "{prompt} :", "answer": " {answer}"}
    task = HF(
        backbone=str(backbones / "llama"), dataset=str(tmp_path / "all.json"), steps=40, looks=1, lr=2e-2, **words
    )
    found = _run(task, _shared(task, tmp_path / "p"), LoRA(r=4))
    assert found.metrics["test/score"] == 1.0


def test_the_loss_is_of_all_tokens_or_of_the_answer(backbones, commonsense, tmp_path):
    task = _asked(backbones, commonsense)
    shared = _shared(task, tmp_path / "p")
    batch = shared.train.batch(torch.tensor([0, 1, 2]))
    logs = shared.base(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    for loss_on in ("all", "answer"):
        kept = [
            -logs[n, i - 1, batch["input_ids"][n, i]].item()
            for n in range(3)
            for i in range(1 if loss_on == "all" else int(batch["starts"][n]), int(batch["attention_mask"][n].sum()))
        ]
        loss = task.model_copy(update={"loss_on": loss_on}).loss(shared.base, batch)
        assert loss.item() == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    words = tokenizer_of(str(backbones / "llama"), "main").convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert words[int(batch["starts"][0])] == "the"


def test_a_question_that_is_too_long_loses_its_beginning_and_keeps_its_answer(backbones, commonsense, tmp_path):
    whole = _shared(_asked(backbones, commonsense), tmp_path / "whole").train
    cut = _shared(_asked(backbones, commonsense, tokens=9), tmp_path / "cut").train
    assert cut.lengths.max() == 9 < whole.lengths.min()
    first, short = whole.batch(torch.tensor([0])), cut.batch(torch.tensor([0]))
    length = int(whole.lengths[0])
    assert short["input_ids"][0].tolist() == first["input_ids"][0, length - 9 : length].tolist()
    assert 9 - int(short["starts"]) == length - int(first["starts"])


def test_two_columns_of_a_question_are_two_lines(backbones, tmp_path):
    rows = [
        {**row, "input": "Answer format: fine/dull" if i % 2 else ""} for i, row in enumerate(_questions(40, "two"))
    ]
    _write(tmp_path / "two.json", rows)
    task = HF(backbone=str(backbones / "llama"), dataset=str(tmp_path / "two.json"), kind="choice", steps=1,
              text=("input", "instruction"), label="answer")  # fmt: skip
    shared = _shared(task, tmp_path / "p")
    assert len(set(shared.train.lengths.tolist())) > 3
    assert shared.tests[""].values["right"].sum() == len(set(shared.tests[""].values["examples"].tolist()))


def test_the_mean_of_several_sets_weighs_them_equally():
    def scores(name, values):
        return Scores({"accuracy": float(np.mean(values))}, columns(id=[f"{name}/{i}" for i in range(len(values))],
                      score=values))  # fmt: skip

    found = together({"a": scores("a", [1.0]), "b": scores("b", [0.0, 0.0, 1.0, 0.0])})
    assert found.metrics == {"accuracy": 0.625, "accuracy_a": 1.0, "accuracy_b": 0.25}
    assert found.examples["id"].tolist() == ["a/0", "b/0", "b/1", "b/2", "b/3"]
    assert found.examples["score"].tolist() == [1, 0, 0, 1, 0]


@pytest.fixture(scope="module")
def functions():
    """Some functions of the standard library; reading all of it takes seconds."""
    found = [pairs_of(Path(module.__file__).read_bytes(), Path(module.__name__)) for module in (argparse, pathlib, ast)]
    return list(unrepeated(pair for some in found for pair in some))


def test_pairs_made_from_docstrings_are_half_their_own(functions):
    rows = builtin.pairs(functions)
    own = [row["code"] == function.code for row, function in zip(rows, functions, strict=True)]
    assert [row["label"] == "own" for row in rows] == own
    assert abs(np.mean(own) - 0.5) < 2.6 * 0.5 / len(own) ** 0.5
    assert rows == builtin.pairs(functions)


def test_questions_made_from_docstrings_offer_four_names_and_the_right_one(functions):
    rows = builtin.choices(functions)
    for row, function in zip(rows, functions, strict=True):
        shown = row["instruction"].split("\n\n")[1]
        names = re.fullmatch(r"Answer1: (\S+) Answer2: (\S+) Answer3: (\S+) Answer4: (\S+)", shown).groups()
        assert len(set(names)) == 4
        assert names[int(row["answer"].removeprefix("answer")) - 1] == function.place[2]
        package = {other.place[2] for other in functions if other.package == function.package}
        assert len(set(names) & package) == min(4, len(package))
    counts = np.bincount([int(row["answer"][-1]) for row in rows], minlength=5)[1:]
    assert stats.chisquare(counts).pvalue > 0.01


# Grids on the meta device


def test_a_grid_over_data_sets_is_checked_without_weights(backbones, glue, tmp_path):
    shutil.copytree(backbones / "deberta", tmp_path / "d", ignore=shutil.ignore_patterns("*.safetensors", "tok*"))
    grid = Outline.of(
        {
            "task": {"name": "hf", "backbone": str(tmp_path / "d"), "data": str(glue)},
            "grid": {"spec": ["LoRA(r=2)"], "wrap": ["{spec}", "MAP({spec})"], "dataset": ["mnli", "rte", "stsb"]},
            "references": ["None"],
        }
    )
    found = cells(grid)
    sizes = check(found)
    rest = {cell.task.dataset: sizes[cell.name].rest for cell in found}
    pooler = 16 * 16 + 16
    assert rest == {"mnli": pooler + 3 * 17, "rte": pooler + 2 * 17, "stsb": pooler + 17}
    assert sizes["MAP(LoRA(r=2)) [dataset=rte]"].adapters == sizes["LoRA(r=2) [dataset=rte]"].adapters + 2 * 6
    assert all(p.is_meta for p in found[0].task.model(None, 0).parameters())


def test_backbone_and_dataset_may_be_axes(backbones, glue):
    grid = Outline.of(
        {
            "task": {"name": "hf", "data": str(glue)},
            "grid": {"spec": ["LoRA(r=1)"], "backbone": [str(backbones / "bert"), str(backbones / "llama")],
                     "dataset": ["sst2"]},
        }
    )  # fmt: skip
    assert sorted(size.layers for size in check(cells(grid)).values()) == [7, 7]


# Fingerprints and the hub


def test_a_fingerprint_follows_every_byte_that_is_read_and_nothing_else(backbones, glue, tmp_path):
    shutil.copytree(backbones / "bert", tmp_path / "model")
    shutil.copytree(glue / "cola", tmp_path / "cola")

    def prints(**options):
        task = HF(backbone=str(tmp_path / "model"), dataset="cola", data=str(tmp_path), **options)
        return task.fingerprint()

    first = prints()
    assert prints(lr=1.0, steps=3) == first
    (tmp_path / "model" / ".notes").write_text("hidden")
    shutil.copytree(backbones / "bert", tmp_path / "other")
    assert prints() == first == prints()
    assert prints(tokenizer=str(tmp_path / "other")) != first
    seen = {first}
    for name in ("model/model.safetensors", "model/tokenizer.json", "cola/train.csv", "cola/validation.csv"):
        path = tmp_path / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        seen.add(prints())
    assert len(seen) == 5


@pytest.fixture(autouse=True)
def forgotten():
    """What was asked of the hub is kept for the time of a process; here for that of a test."""
    for kept in (sources._hub_builder, hf_models._config, classes_of):
        kept.cache_clear()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No hub, and an empty cache of it; the folder of that cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "cache"


def test_a_name_in_the_hubs_cache_needs_no_network_and_its_commit_is_its_fingerprint(
    offline, backbones, glue, tmp_path
):
    place = offline / "models--me--tiny"
    shutil.copytree(backbones / "bert", place / "snapshots" / "c0ffee")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("c0ffee")
    task = HF(backbone="me/tiny", dataset="sst2", data=str(glue), steps=2, looks=1)
    assert task.fingerprint().split()[0] == "c0ffee"
    assert "test/score" in _run(task, _shared(task, tmp_path / "p"), LoRA(r=1)).metrics


def test_without_a_hub_the_error_says_what_to_put_where(offline, backbones):
    with pytest.raises(GridError, match=r"(?s)'nobody/gone' is no folder here.*config\.json, model\.safetensors"):
        HF(backbone="nobody/gone", dataset="rte").fingerprint()
    data = r"'nyu-mll/glue' \(rte\) can't be had from the hub.*data=FOLDER, with FOLDER/rte/train\.parquet"
    with pytest.raises(GridError, match=f"(?s){data}"):
        HF(backbone=str(backbones / "bert"), dataset="rte").fingerprint()
    with pytest.raises(GridError, match=f"(?s){data}"):
        Source("rte").splits()
    with pytest.raises(GridError, match=r"did you mean 'mrpc'\?.*dataset=FOLDER, with FOLDER/train\.parquet"):
        HF(backbone=str(backbones / "bert"), dataset="mrcp").fingerprint()


def test_a_data_set_of_the_hub_is_asked_for_by_name_and_subset(monkeypatch, backbones, glue, tmp_path):
    asked = []
    rows = {
        split: datasets.Dataset.from_list(_rows("rte", n, split)) for split, n in (("train", 30), ("validation", 8))
    }

    class Builder:
        hash = "0a1b"
        info = datasets.DatasetInfo(features=datasets.Features({"label": datasets.ClassLabel(names=["n", "y"]),
                                                                "sentence1": datasets.Value("string")}))  # fmt: skip

    def builder(*name):
        asked.append(("builder", *name))
        return Builder

    def load(*name):
        asked.append(("load", *name))
        return datasets.DatasetDict(rows)

    monkeypatch.setattr("adapterzoo.ablation.tasks.hf.sources.load_dataset_builder", builder)
    monkeypatch.setattr("adapterzoo.ablation.tasks.hf.sources.load_dataset", load)
    task = HF(backbone=str(backbones / "bert"), dataset="rte", steps=1)
    assert task.fingerprint().split()[-1] == "0a1b"
    assert len(_shared(task, tmp_path / "p").train) == 27
    assert asked == [("builder", "nyu-mll/glue", "rte"), ("load", "nyu-mll/glue", "rte")]
    other = HF(backbone=str(backbones / "bert"), dataset="some/where", subset="en", text=("sentence1",), steps=1)
    assert other.model(None, 0).classifier.weight.shape[0] == 2
    assert asked[2:] == [("builder", "some/where", "en")]
    with pytest.raises(GridError, match=r"declares no classes in 'sentence1' .*labels=\[\.\.\.\]"):
        HF(backbone=str(backbones / "bert"), dataset="some/where", subset="en", label="sentence1").model(None, 0)


# What can go wrong


def _refused(task, folder):
    folder.mkdir()
    with pytest.raises(GridError) as caught:
        task.prepare(folder)
    return str(caught.value)


def _own(backbones, path, rows, **options):
    _write(path, rows)
    return HF(backbone=str(backbones / "bert"), dataset=str(path), steps=1, **options)


def test_columns_that_are_missing_are_named_with_the_nearest(backbones, tmp_path):
    rows = [{"sentense": "fine", "lable": i % 2} for i in range(40)]
    task = _own(backbones, tmp_path / "a.csv", rows, text=("sentence",), labels=("0", "1"))
    message = _refused(task, tmp_path / "p")
    assert "'sentence'; did you mean 'sentense'?" in message
    assert "'label'; did you mean 'lable'?" in message


@pytest.mark.parametrize(
    ("label", "options", "said"),
    [
        ("entailmnt", {"labels": ("entailment", "other")}, "'entailmnt'; did you mean 'entailment'?"),
        (-1, {"labels": ("no", "yes")}, "-1 stands for a label that is hidden"),
        (2, {"labels": ("no", "yes")}, "labels in 'label' that are none of no, yes"),
        ("much", {"kind": "regression"}, "'label' holds what is no number"),
    ],
)
def test_labels_that_do_not_fit_are_named(label, options, said, backbones, tmp_path):
    rows = [{"text": "fine", "label": label} for _ in range(40)]
    message = _refused(_own(backbones, tmp_path / "a.json", rows, **options), tmp_path / "p")
    assert said in message
    assert repr(label) in message or repr(str(label)) in message


def test_numbers_that_are_not_finite_and_rows_without_a_text_are_named(backbones, tmp_path):
    rows = [{"text": "fine", "label": 1.5 if i else float("inf")} for i in range(40)]
    assert "train/0: inf" in _refused(_own(backbones, tmp_path / "a.parquet", rows, kind="regression"), tmp_path / "p")
    rows = [{"text": None if i == 7 else "fine", "label": i % 2} for i in range(40)]
    assert "'text' holds what is no text:\n  - train/7: None" in _refused(
        _own(backbones, tmp_path / "b.parquet", rows), tmp_path / "q"
    )


def test_answers_that_a_question_does_not_offer_are_named(backbones, tmp_path):
    rows = [{"text": "Is it? Answer format: true/false", "label": "maybe" if i == 3 else "true"} for i in range(40)]
    _write(tmp_path / "a.json", rows)
    task = HF(backbone=str(backbones / "llama"), dataset=str(tmp_path / "a.json"), kind="choice", test=40, steps=1)
    rows = [{"text": "Is it?", "label": "true"} for _ in range(40)]
    _write(tmp_path / "b.json", rows)
    other = HF(backbone=str(backbones / "llama"), dataset=str(tmp_path / "b.json"), kind="choice", steps=1)
    assert "'true' is none of no answers" in _refused(other, tmp_path / "q")
    source = Source(task.dataset).splits()["train"]
    source.save_to_disk(tmp_path / "saved")
    _write(tmp_path / "all" / "train.json", [row for row in source if row["label"] != "maybe"])
    _write(tmp_path / "all" / "test.json", list(source))
    whole = HF(backbone=str(backbones / "llama"), dataset=str(tmp_path / "all"), kind="choice", steps=1)
    assert "test/3: 'maybe' is none of true, false" in _refused(whole, tmp_path / "r")


def _folder(tmp_path, **files):
    for name, content in files.items():
        path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "source", "said"),
    [
        ({"x_dot_md": "no"}, ".", "holds no .csv, .tsv, .json, .jsonl, .parquet file"),
        ({"x_dot_txt": "no"}, "x.txt", "has none of the endings .csv"),
        ({"train_dot_json": "{nonsense"}, ".", "train.json can't be read"),
        ({"train_dot_csv": "text,label\na,1\n", "train_dot_jsonl": "{}"}, ".", "in files of two kinds"),
        ({"left_dot_csv": "text\na\n", "right_dot_csv": "text\na\n"}, ".", "none of the splits is called train"),
        ({"train_dot_csv": "text,label\na,1\n", "test_dot_csv": "text,label\n"}, ".", "test.csv can't be read"),
        ({"train_dot_csv": "text,label\na,1\n"}, ".", "too few to split off a test part"),
        ({"dataset_info_dot_json": "{}"}, ".", "can't be read as a saved data set"),
    ],
)
def test_files_that_can_not_be_used_are_named(files, source, said, tmp_path):
    place = _folder(tmp_path, **files) / source
    with pytest.raises(GridError) as caught:
        parts_of(Source(str(place)), None, 1000, None)
    assert said in str(caught.value)


def test_a_label_with_one_value_is_refused(backbones, tmp_path):
    task = _own(backbones, tmp_path / "a.csv", [{"text": "fine", "label": 1} for _ in range(40)])
    assert "has one value alone, '1'" in _refused(task, tmp_path / "p")


def test_a_preset_that_is_not_in_the_folder_is_named_with_the_nearest(glue, tmp_path):
    with pytest.raises(GridError, match=r"holds no 'rte'; it holds rt; did you mean 'rt'\?"):
        Source("rte", data=str(_folder(tmp_path, rt__train_dot_csv="text\n"))).splits()
    with pytest.raises(GridError, match="is no folder"):
        Source("rte", data=str(tmp_path / "none")).splits()
    shutil.copytree(glue / "mnli", tmp_path / "mnli")
    (tmp_path / "mnli" / "validation_mismatched.parquet").rename(tmp_path / "mnli" / "validation_mismatch.parquet")
    with pytest.raises(GridError, match=r"'validation_mismatched'; did you mean 'validation_mismatch'\?"):
        parts_of(Source("mnli", data=str(tmp_path)), None, 10, None)


def test_commonsense_says_which_files_it_wants(commonsense, tmp_path):
    with pytest.raises(GridError, match=r"give data=FOLDER, with commonsense_170k\.json"):
        Source("commonsense").fingerprint()
    shutil.copytree(commonsense, tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "dataset" / "piqa")
    with pytest.raises(GridError, match=r"lacks files of the commonsense data:\n  - piqa/test.json$"):
        Source("commonsense", data=str(tmp_path / "c")).splits()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 3, "epochs": 2}, "steps=3 and epochs=2 both say how long"),
        ({"measure": "pearson"}, "measure='pearson' is none of classification: accuracy, f1, matthews"),
        ({"measure": "acuracy"}, "did you mean 'accuracy'?"),
        ({"dtype": "bfloat16"}, "the new head of classification would train in it"),
        ({"labels": ["a"]}, "give two or more"),
        ({"labels": ["a", "a"]}, "and different ones"),
        ({"template": "prompt"}, "template holds {prompt}"),
        ({"text": ["a", "b", "c"]}, "text"),
        ({"tokenz": 3}, "did you mean 'tokens'?"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, said):
    with pytest.raises(GridError) as caught:
        make_task({"name": "hf", "backbone": "x", "dataset": "y", **options})
    assert said in str(caught.value)


def test_a_task_without_backbone_or_dataset_says_what_they_may_be(backbones):
    with pytest.raises(GridError, match="hf needs a backbone"):
        HF(dataset="rte").model(None, 0)
    with pytest.raises(GridError, match="hf needs a dataset: mnli"):
        HF(backbone=str(backbones / "bert")).fingerprint()


def test_a_warm_up_as_long_as_the_training_is_refused():
    with pytest.raises(TrainingError, match="warmup_steps=100, but the run has 8 steps"):
        HF(backbone="x", dataset="d", epochs=1, warmup_steps=100).settled(250)


def test_a_model_without_tokenizer_weights_or_config_is_refused_by_name(backbones, glue, tmp_path):
    shutil.copytree(backbones / "bert", tmp_path / "m")
    for path in (tmp_path / "m").glob("tokenizer*"):
        path.unlink()
    task = HF(backbone=str(tmp_path / "m"), dataset="sst2", data=str(glue), steps=1)
    assert "gives no tokenizer" in _refused(task, tmp_path / "p")
    assert "tokenizer=NAME or FOLDER" in _refused(task, tmp_path / "q")
    lent = HF(backbone=str(tmp_path / "m"), tokenizer=str(backbones / "bert"), dataset="sst2", data=str(glue), steps=1)
    assert "test/score" in _run(lent, _shared(lent, tmp_path / "r")).metrics
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(GridError, match="gives no weights for this task"):
        Named(str(tmp_path / "m"), outputs=2).load()
    (tmp_path / "empty").mkdir()
    with pytest.raises(GridError, match="gives no config for this task"):
        Named(str(tmp_path / "empty"), outputs=2).config()


def test_weights_that_lack_more_than_the_head_are_refused(backbones, tmp_path):
    with torch.random.fork_rng():
        bare = tf.BertModel(tf.BertConfig(**SHAPE, vocab_size=40), add_pooling_layer=False)
    bare.save_pretrained(tmp_path / "m")
    with pytest.raises(GridError, match=r"lack what is no head, and would be random and frozen:\n  - bert\.pooler"):
        Named(str(tmp_path / "m"), outputs=2).load()


def test_random_weights_are_drawn_once_and_for_all(backbones, tmp_path):
    outside = torch.get_rng_state()
    named = Named(str(backbones / "llama"), weights="random", dtype="bfloat16")
    first, again = named.load(), named.load()
    assert torch.get_rng_state().equal(outside)
    for name, value in first.named_parameters():
        assert value.equal(again.get_parameter(name))
        assert value.dtype is torch.bfloat16
        assert not value.requires_grad
    assert not first.lm_head.weight.float().equal(Named(str(backbones / "llama")).load().lm_head.weight)


def test_a_package_carries_a_model_and_errors_name_what_is_missing():
    assert place_of("package:adapterzoo/ablation/recipes/tiny-llama").endswith("tiny-llama")
    with pytest.raises(MissingPackageError, match="the package 'no_such_thing' is not installed"):
        place_of("package:no_such_thing/model")
    with pytest.raises(GridError, match=r"adapterzoo has no folder 'ablations'; did you mean 'ablation'\?"):
        place_of("package:adapterzoo/ablations")


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else found(name))
    with pytest.raises(MissingPackageError, match=r'the task hf needs datasets: pip install "adapterzoo\[hf\]"'):
        importlib.reload(adapterzoo.ablation.tasks.hf)


def test_a_loss_that_is_not_finite_fails_the_run_by_name(backbones, glue, tmp_path):
    task = _task(backbones, glue)
    shared = _shared(task, tmp_path / "p")
    with torch.no_grad():
        shared.base.bert.embeddings.word_embeddings.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"LoRA\(r=2\), seed 0.*loss is nan at step 1"):
        _run(task, shared, LoRA(r=2))
