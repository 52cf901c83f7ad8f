"""Two data sets that need no file: made from the docstrings of Python's own standard library.

They stand in for GLUE and for commonsense questions where neither can be had: real text, small, and the same everywhere
for one version of Python.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch

from adapterzoo.ablation.docstrings import Pair, fingerprint, split, standard_library
from adapterzoo.ablation.tasks.hf.presets import BUILT_IN
from adapterzoo.streams import stream

Row = dict[str, str]
_CHOICES = 4


def rows(name: str) -> dict[str, list[Row]]:
    """The rows of each split: train, validation and test; whole packages are in one or another."""
    parts = split(standard_library())
    return {part: _MAKERS[name](getattr(parts, part)) for part in ("train", "validation", "test")}


def digest() -> str:
    """A short hash of all the texts that rows are made of."""
    return fingerprint(standard_library())


def pairs(functions: Sequence[Pair]) -> list[Row]:
    """A docstring with its own function's code or, as often, with another's."""
    found = []
    for index, function in enumerate(functions):
        draw = stream("stdlib-pairs", *function.place)
        own = bool(torch.randint(2, (), generator=draw))
        step = int(torch.randint(1, len(functions), (), generator=draw))
        code = function.code if own else functions[(index + step) % len(functions)].code
        found.append({"docstring": function.docstring, "code": code, "label": "own" if own else "other"})
    return found


def choices(functions: Sequence[Pair]) -> list[Row]:
    """Which name has the function that a docstring describes? Four answers, in the form of the commonsense sets."""
    packages: dict[str, list[str]] = defaultdict(list)
    for function in functions:
        packages[function.package].append(function.place[2])
    every = list(dict.fromkeys(name for names in packages.values() for name in names))
    return [_question(function, list(dict.fromkeys(packages[function.package])), every) for function in functions]


def _question(function: Pair, near: Sequence[str], every: Sequence[str]) -> Row:
    """A question about a function; wrong names are of its package, as far as there are any."""
    draw = stream("stdlib-choices", *function.place)
    order = [*_shuffled(near, draw), *_shuffled(every, draw, 2 * _CHOICES)]
    names = [name for name in dict.fromkeys(order) if name != function.place[2]][: _CHOICES - 1]
    own = int(torch.randint(_CHOICES, (), generator=draw))
    names.insert(own, function.place[2])
    answers = [f"answer{number}" for number in range(1, _CHOICES + 1)]
    shown = " ".join(f"{answer.capitalize()}: {name}" for answer, name in zip(answers, names, strict=True))
    asked = f"Please choose the name of the function that does this: {function.docstring}"
    return {"instruction": f"{asked}\n\n{shown}\n\nAnswer format: {'/'.join(answers)}", "answer": answers[own]}


def _shuffled(names: Sequence[str], draw: torch.Generator, count: int | None = None) -> list[str]:
    """Names in a drawn order; some of them, where `count` is given, and one may come twice."""
    if count is None:
        return [names[index] for index in torch.randperm(len(names), generator=draw).tolist()]
    return [names[index] for index in torch.randint(len(names), (count,), generator=draw).tolist()]


_MAKERS: Mapping[str, Callable[[Sequence[Pair]], list[Row]]] = dict(zip(BUILT_IN, (pairs, choices), strict=True))
