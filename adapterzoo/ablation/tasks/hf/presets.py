"""Data sets with a name: where they are, what their columns mean, and the options that the MAP paper gives for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TRAIN, VALIDATION, TEST = "train", "validation", "test"
COMMONSENSE = "commonsense"


@dataclass(frozen=True)
class Preset:
    """A data set that the task knows.

    Args:
        options: values of the task's options where a grid says nothing else.
        tests: names of the sets that make up the test part, to the splits that they are; the one that is called "" is
            the one that counts, and without such a one their mean does.
        hub: its name on the hub; "" if it is read from local files alone.
        train: the split for training.
    """

    options: Mapping[str, Any]
    tests: Mapping[str, str] = field(default_factory=lambda: {"": VALIDATION})
    hub: str = "nyu-mll/glue"
    train: str = TRAIN


def _glue(text: str, lr: float, epochs: int, tokens: int, labels: str, measure: str = "accuracy") -> dict[str, Any]:
    """Options of a task of GLUE, from Table 8 of arXiv 2505.23094."""
    kind = "classification" if labels else "regression"
    return {
        "kind": kind, "text": tuple(text.split()), "label": "label", "labels": tuple(labels.split()),
        "measure": measure, "lr": lr, "epochs": epochs, "tokens": tokens, "batch": 32, "warmup": 0.1,
        "schedule": "linear",
    }  # fmt: skip


_ENTAILED = "entailment not_entailment"
_MATCHED = {"": "validation_matched", "mismatched": "validation_mismatched"}
_QUESTIONS = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")

PRESETS: Mapping[str, Preset] = {
    "mnli": Preset(_glue("premise hypothesis", 5e-4, 12, 256, "entailment neutral contradiction"), _MATCHED),
    "sst2": Preset(_glue("sentence", 8e-4, 24, 128, "negative positive")),
    "cola": Preset(_glue("sentence", 8e-4, 25, 64, "unacceptable acceptable", "matthews")),
    "qqp": Preset(_glue("question1 question2", 1e-3, 5, 320, "not_duplicate duplicate")),
    "qnli": Preset(_glue("question sentence", 5e-4, 5, 512, _ENTAILED)),
    "rte": Preset(_glue("sentence1 sentence2", 1.2e-3, 50, 320, _ENTAILED)),
    "mrpc": Preset(_glue("sentence1 sentence2", 1e-3, 30, 320, "not_equivalent equivalent")),
    "stsb": Preset(_glue("sentence1 sentence2", 5e-4, 25, 128, "", "pearson")),
    # Table 6 of the paper. The published code reads at most 256 tokens, and learns questions as well as answers.
    COMMONSENSE: Preset(
        {
            "kind": "choice", "text": ("instruction",), "label": "answer", "answer": "the correct answer is {answer}",
            "lr": 3e-4, "epochs": 3, "tokens": 256, "batch": 16, "warmup_steps": 100, "schedule": "linear",
            "dtype": "bfloat16", "targets": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
        },
        {name: name for name in _QUESTIONS},
        hub="",
    ),
    "stdlib-pairs": Preset(
        {"kind": "classification", "text": ("docstring", "code"), "labels": ("other", "own"), "tokens": 48},
        {"": TEST},
        hub="",
    ),
    "stdlib-choices": Preset(
        {"kind": "choice", "text": ("instruction",), "label": "answer", "answer": "the correct answer is {answer}"},
        {"": TEST},
        hub="",
    ),
}  # fmt: skip
GLUE = tuple(name for name, preset in PRESETS.items() if preset.hub)
BUILT_IN = ("stdlib-pairs", "stdlib-choices")
