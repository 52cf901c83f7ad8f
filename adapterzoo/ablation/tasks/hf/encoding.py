"""From rows of text to token ids: once a grid, in `prepare`."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterzoo.ablation.tasks.hf.columns import Part, check_columns, class_numbers, numbers, texts
from adapterzoo.ablation.tasks.hf.rows import IDS, TYPES, Rows, rows_of
from adapterzoo.errors import GridError, listing

_AT_ONCE = 1000
_FORMAT = re.compile(r"Answer format:\s*(\S+)")


@dataclass(frozen=True)
class Wording:
    """The options of the task that say how rows become texts: see `HF`."""

    kind: str
    text: tuple[str, ...]
    label: str
    template: str
    answer: str
    tokens: int


def labelled(part: Part, wording: Wording, classes: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Rows:
    """One row an example: its text, or pair of texts, cut off at the end; the label is a class or a number."""
    check_columns(part, [*wording.text, wording.label])
    columns = [texts(part, name) for name in wording.text]
    regression = wording.kind == "regression"
    labels = numbers(part, wording.label) if regression else class_numbers(part, wording.label, classes)
    found: dict[str, list[list[int]]] = {}
    for start in range(0, len(part.names), _AT_ONCE):
        some = [column[start : start + _AT_ONCE] for column in columns]
        encoded = tokenizer(*some, truncation=True, max_length=wording.tokens, return_attention_mask=False)
        for name in (IDS, TYPES):
            if name in encoded:
                found.setdefault(name, []).extend(encoded[name])
    return rows_of(found, {"labels": labels, "names": part.names}, _pad(tokenizer))


def answered(part: Part, wording: Wording, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """One row an example: the question with its right answer; `starts` says where the answer begins."""
    asked, right = _questions(part, wording), texts(part, wording.label)
    ids, starts = _answers(list(zip(asked, right, strict=True)), wording, tokenizer)
    return rows_of({IDS: ids}, {"starts": starts, "names": part.names}, _pad(tokenizer))


def offered(part: Part, wording: Wording, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """One row an answer that may be chosen: `examples` is the number of its question, `right` says which is right.

    Raises:
        GridError: questions that say nothing of their answers, or whose right answer is not among them.
    """
    asked, right = _questions(part, wording), texts(part, wording.label)
    answers = [_offered(question) for question in asked]
    wrong = [
        f"{name}: {answer!r} is none of {', '.join(among) or 'no answers'}"
        for name, answer, among in zip(part.names, right, answers, strict=True)
        if answer not in among
    ]
    if wrong:
        raise GridError(
            f"a question of kind choice ends with its answers, as in 'Answer format: true/false':{listing(wrong)}"
        )
    order = [(number, answer) for number, among in enumerate(answers) for answer in among]
    ids, starts = _answers([(asked[number], answer) for number, answer in order], wording, tokenizer)
    values: dict[str, Sequence[Any]] = {
        "starts": starts,
        "examples": [number for number, _ in order],
        "right": [answer == right[number] for number, answer in order],
        "names": [part.names[number] for number, _ in order],
    }
    return rows_of({IDS: ids}, values, _pad(tokenizer))


def _questions(part: Part, wording: Wording) -> list[str]:
    check_columns(part, [*wording.text, wording.label])
    columns = [texts(part, name) for name in wording.text]
    return ["\n".join(text for text in row if text) for row in zip(*columns, strict=True)]


def _offered(question: str) -> list[str]:
    """The answers that a question names last.

    Example:
        >>> _offered("Is it so? Answer format: true/false")
        ['true', 'false']
    """
    found = _FORMAT.findall(question)
    return list(dict.fromkeys(found[-1].split("/"))) if found else []


def _answers(
    order: Sequence[tuple[str, str]], wording: Wording, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[int]]:
    """Token ids of questions with answers, and where each answer begins."""
    ids: list[list[int]] = []
    starts: list[int] = []
    for some in _blocks(order):
        asked = [wording.template.replace("{prompt}", question) for question, _ in some]
        whole = [q + wording.answer.replace("{answer}", a) for q, (_, a) in zip(asked, some, strict=True)]
        encoded: Any = tokenizer(whole, return_offsets_mapping=True, return_attention_mask=False)
        for question, row, offsets in zip(asked, encoded[IDS], encoded["offset_mapping"], strict=True):
            start = next((i for i, (_, end) in enumerate(offsets) if end > len(question)), len(row))
            row, start = _cut(_ended(row, tokenizer), start, wording.tokens)
            ids.append(row)
            starts.append(start)
    return ids, starts


def _blocks(order: Sequence[tuple[str, str]]) -> Iterator[Sequence[tuple[str, str]]]:
    for start in range(0, len(order), _AT_ONCE):
        yield order[start : start + _AT_ONCE]


def _ended(row: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The row with an end, so that an answer is not taken for the beginning of a longer one."""
    end = tokenizer.eos_token_id
    return row if end is None or row[-1] == end else [*row, end]


def _cut(row: list[int], start: int, tokens: int) -> tuple[list[int], int]:
    """The end of a row that is too long: its answer stays; what is asked loses its beginning.

    Example:
        >>> _cut([1, 2, 3, 4, 5], 3, 4)
        ([2, 3, 4, 5], 2)
    """
    over = max(0, len(row) - tokens)
    return row[over:], max(1, start - over)  # a first token can't be predicted


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.pad_token_id)
