"""The task `hf`: a model of Transformers, adapted to a data set; GLUE and commonsense questions as in the papers."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapterzoo.ablation.tasks.hf.encoding import Wording, answered, labelled, offered
from adapterzoo.ablation.tasks.hf.heads import head_names, redraw
from adapterzoo.ablation.tasks.hf.kinds import (
    label_loss,
    look_at_answers,
    look_at_choices,
    look_at_labels,
    text_loss,
    together,
)
from adapterzoo.ablation.tasks.hf.measures import MEASURES
from adapterzoo.ablation.tasks.hf.models import Named, Weights
from adapterzoo.ablation.tasks.hf.parts import classes_of, parts_of
from adapterzoo.ablation.tasks.hf.presets import PRESETS, TEST, TRAIN, VALIDATION
from adapterzoo.ablation.tasks.hf.rows import Batch, Rows, read_rows, write_rows
from adapterzoo.ablation.tasks.hf.sources import Source
from adapterzoo.ablation.tasks.hf.tokenizer import tokenizer_of
from adapterzoo.ablation.tasks.hf.training import Clipped
from adapterzoo.ablation.tasks.registry import task
from adapterzoo.ablation.tasks.sharing import sharing_copy
from adapterzoo.ablation.tasks.task import Outcome, Part, Run, Scores, Task
from adapterzoo.errors import GridError, TrainingError, did_you_mean
from adapterzoo.streams import stream

_CLASSES = "classes.json"
_STEPS = Task.model_fields["steps"].default
_LABELLED = ("classification", "regression")
TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)


@dataclass(frozen=True, eq=False)
class Shared:
    """What runs share: the pretrained model, and the tokenised rows of each part; those of the test part by set."""

    base: PreTrainedModel
    train: Rows
    validation: Rows
    tests: Mapping[str, Rows]


@task
class HF(Task):
    """Any model of Transformers on any data set: classes, numbers, questions with choices, or answers word for word.

    The metric is `score`: the data set's own measure, so that a grid may go over several data sets; all measures are
    told beside it. `dataset` gives the defaults of all other options where it is one of GLUE's tasks (mnli, sst2, cola,
    qqp, qnli, rte, mrpc, stsb) or `commonsense`: those of arXiv 2505.23094, Tables 6 and 8.

    A new head trains beside the adapters: what the architecture has beside its body (`classifier`, `score`, `pooler`
    and `classifier`, ...). A causal language model gets none.

    Args:
        backbone: the model: a name on the hub, a folder, or "package:NAME/FOLDER" of an installed package.
        revision: its branch, tag or commit on the hub.
        tokenizer: where the tokenizer is; with the model if not given.
        weights: "random" draws the base from the config once and for all: for costs and for trying things out.
        dtype: of the base; "bfloat16" for kinds without a head alone, since heads train in the base's dtype.
        dataset: one of the above, a name on the hub, a file (csv, tsv, json, jsonl, parquet), a folder of files that
            are named for their splits, or one that `save_to_disk` wrote. "stdlib-pairs" and "stdlib-choices" need no
            file: they are made from Python's own docstrings.
        subset: which configuration of a data set on the hub.
        data: folder that holds a folder for each of GLUE's tasks, or the commonsense files; the hub if not given.
        kind: "classification", "regression", "choice" (the answer with the largest log-likelihood) or "exact" (greedy
            decoding gives the answer).
        text: one column, or two for a pair; of a question with an input, both.
        label: the column of the label or of the right answer.
        labels: names of the classes in their order; from the data if not given.
        measure: what the score is: accuracy, f1, matthews; pearson, spearman.
        template: the text around a question, which stands for {prompt}.
        answer: the text of an answer, with {answer} for what the data say.
        loss_on: "all" tokens of question and answer, or "answer".
        tokens: texts are cut off there: labelled ones lose their end, questions their beginning.
        epochs: passes over the training part; they decide the steps. None: `steps` does.
        warmup_steps: in the place of `warmup`, as a number of steps.
        clip: the largest norm of all gradients together; None leaves them as they are.
        train, validation, test: how many examples of each part (of each set of the test part) are used; None: all. The
            validation part is split off the training part, a tenth of it at most, unless the data have one besides a
            test part; the test part of GLUE is its published validation set.

    Raises:
        ValueError: options that contradict each other.
        GridError: from its methods: a model or data that can't be had or read, columns or labels that don't fit.
    """

    name = "hf"
    metric = "score"
    unprepared: ClassVar[frozenset[str]] = Task.unprepared | {
        "targets", "epochs", "warmup_steps", "clip", "loss_on", "measure",
    }  # fmt: skip

    backbone: str = ""  # needed, and often an axis: a grid builds its task before it knows the axes
    dataset: str = ""
    revision: str = "main"
    tokenizer: str = ""
    weights: Weights = "pretrained"
    dtype: Literal["float32", "bfloat16"] = "float32"
    subset: str = ""
    data: str = ""
    kind: Literal["classification", "regression", "choice", "exact"] = "classification"
    text: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)] = ("text",)
    label: str = "label"
    labels: tuple[str, ...] = ()
    measure: str = ""
    template: str = TEMPLATE
    answer: str = "{answer}"
    loss_on: Literal["all", "answer"] = "all"
    tokens: Annotated[int, Field(ge=2)] = 128
    epochs: Annotated[float, Field(gt=0)] | None = None
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    train: Annotated[int, Field(ge=1)] | None = None
    validation: Annotated[int, Field(ge=1)] = 1000
    test: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        """The data set's own options, under those that are given; `steps` alone takes the place of its epochs."""
        if not isinstance(given, Mapping) or given.get("dataset") not in PRESETS:
            return given
        options = dict(PRESETS[given["dataset"]].options)
        if "steps" in given:
            options.pop("epochs", None)
        if "warmup" in given:
            options.pop("warmup_steps", None)
        return {**options, **given}

    @field_validator("measure")
    @classmethod
    def _known(cls, measure: str) -> str:
        known = sorted({name for names in MEASURES.values() for name in names})
        if measure and measure not in known:
            raise ValueError(f"choose from {', '.join(known)}{did_you_mean(measure, known)}")
        return measure

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.epochs is not None and self.steps != _STEPS:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs:g} both say how long; give one of them")
        if self.measure and self.measure not in MEASURES[self.kind]:
            raise ValueError(f"measure={self.measure!r} is none of {self.kind}: {', '.join(MEASURES[self.kind])}")
        if self.kind in _LABELLED and self.dtype != "float32":
            raise ValueError(f"dtype={self.dtype!r}: the new head of {self.kind} would train in it; use float32")
        if len(set(self.labels)) < len(self.labels) or len(self.labels) == 1:
            raise ValueError(f"labels={self.labels}: give two or more, and different ones")
        if "{prompt}" not in self.template or "{answer}" not in self.answer:
            raise ValueError("template holds {prompt}, and answer {answer}")
        return self

    @property
    def trained(self) -> tuple[str, ...]:  # type: ignore[override]  # the architecture decides, not the class
        """The new head's modules."""
        return head_names(self._named().skeleton()) if self.kind in _LABELLED else ()

    def fingerprint(self) -> str:
        """The files' content, or the hub's commit and datasets' hash; of model, tokenizer and data."""
        tokenizer = [Named(self.tokenizer, self.revision).fingerprint()] if self.tokenizer else []
        return " ".join([self._named().fingerprint(), *tokenizer, self._source().fingerprint()])

    def prepare(self, folder: Path) -> None:
        """Tokenise every part."""
        parts = parts_of(self._source(), self.train, self.validation, self.test)
        tokenizer = tokenizer_of(self.tokenizer or self.backbone, self.revision)
        classes = self._classes() if self.kind == "classification" else ()
        wording = Wording(self.kind, self.text, self.label, self.template, self.answer, self.tokens)
        for name, part in parts.all().items():
            learnt = name == TRAIN or self.kind == "exact"
            if self.kind in _LABELLED:
                rows = labelled(part, wording, classes, tokenizer)
            else:
                rows = answered(part, wording, tokenizer) if learnt else offered(part, wording, tokenizer)
            write_rows(folder / f"{name}.npz", rows)

    def load(self, folder: Path) -> Shared:
        """The model, frozen, and the rows."""
        found = {path.stem: read_rows(path) for path in sorted(folder.glob("*.npz"))}
        train, validation = found.pop(TRAIN), found.pop(VALIDATION)
        base = self._named().load()
        if base.config.get_text_config().pad_token_id is None:
            base.config.get_text_config().pad_token_id = train.pad  # decoders with a head look for the last real token
        tests = {name.removeprefix(TEST).removeprefix("-"): rows for name, rows in found.items()}
        return Shared(base, train, validation, tests)

    def model(self, shared: Shared | None, seed: int) -> nn.Module:
        """The model with a head drawn from the seed; the base's numbers are those of `shared`, not copied."""
        model: nn.Module = self._named().skeleton() if shared is None else sharing_copy(shared.base)
        if shared is not None:
            redraw(model, self.trained, seed)
        return model

    def batches(self, shared: Shared, seed: int) -> Iterator[Batch]:
        """Every example once a pass, in an order of its own; the last batch of a pass may be smaller."""
        order, left = stream("batches", seed), self.steps
        while left:
            for chosen in torch.split(torch.randperm(len(shared.train), generator=order), self.batch)[:left]:
                left -= 1
                yield shared.train.batch(chosen)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy or squared error of labels; −log p of tokens."""
        return label_loss(model, batch) if self.kind in _LABELLED else text_loss(model, batch, self.loss_on == "all")

    def scores(self, model: nn.Module, shared: Shared, part: Part, seed: int) -> Scores:
        """All measures; `score` is the one that counts, of the set or the mean over sets that counts."""
        sets = {"": shared.validation} if part == "validation" else shared.tests
        found = together({name: self._look(model, rows) for name, rows in sets.items()})
        chosen = self.measure or MEASURES[self.kind][0]
        return Scores({"score": found.metrics[chosen], **found.metrics}, found.examples)

    def run(self, run: Run) -> Outcome:
        """The default loop with clipped gradients, over as many steps as the epochs come to."""
        training = Clipped(self.settled(len(run.shared.train)), run)
        training.clip = self.clip
        while training.left:
            training.step()
        return training.finish()

    def settled(self, examples: int) -> Self:
        """The task with its epochs as steps, and its warm-up as a share of them.

        Args:
            examples: of the training part.

        Raises:
            TrainingError: a warm-up that is as long as the training.
        """
        steps = self.steps if self.epochs is None else max(1, round(self.epochs * math.ceil(examples / self.batch)))
        warmup = self.warmup if self.warmup_steps is None else self.warmup_steps / steps
        if warmup >= 1:
            raise TrainingError(f"warmup_steps={self.warmup_steps}, but the run has {steps} steps; take fewer")
        return self.model_copy(update={"steps": steps, "warmup": warmup})

    def _look(self, model: nn.Module, rows: Rows) -> Scores:
        if self.kind in _LABELLED:
            return look_at_labels(model, rows, self.kind == "regression")
        return look_at_choices(model, rows) if self.kind == "choice" else look_at_answers(model, rows)

    def _source(self) -> Source:
        if not self.dataset:
            raise GridError(f"hf needs a dataset: {', '.join(PRESETS)}, a name on the hub, a file or a folder")
        return Source(self.dataset, self.subset, self.data)

    def _named(self) -> Named:
        if not self.backbone:
            raise GridError("hf needs a backbone: a model's name on the hub, a folder, or package:NAME/FOLDER")
        outputs = len(self._classes()) if self.kind == "classification" else int(self.kind == "regression")
        return Named(self.backbone, self.revision, outputs, self.weights, self.dtype)

    def _classes(self) -> tuple[str, ...]:
        return self.labels or classes_of(self._source(), self.label)
