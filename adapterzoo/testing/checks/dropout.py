"""Dropout on the way into the generator's columns."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from adapterzoo.layer import AdaptedLinear
from adapterzoo.pieces import Piece, Wrapper, layers_of
from adapterzoo.testing.case import Case, perturb
from adapterzoo.testing.check import check, everywhere, generator_of
from adapterzoo.testing.comparing import TOLERANCES, differs, size
from adapterzoo.testing.failure import require
from adapterzoo.testing.options import Choose
from adapterzoo.testing.parts import starts_neutral
from adapterzoo.testing.subject import Subject

_COPIES = 2000
_RATES = (0.1, 0.5)


def drops(subject: Subject) -> bool:
    """Whether a class or the generator of a composition has dropout, or a class of wrappers may wrap what has."""
    innermost = subject.kind if subject.spec is None else type(layers_of(subject.spec)[-1])
    return "dropout" in innermost.model_fields or subject.needs_inside


def _with_dropout(subject: Subject, choose: Choose) -> Iterator[Case]:
    for case in everywhere(subject, choose):
        if "dropout" in type(generator_of(case)).model_fields:
            yield replace(case, spec=dropping(case.piece, choose(_RATES)))


def dropping(spec: Piece, rate: float) -> Piece:
    """The composition with that dropout in its generator."""
    if isinstance(spec, Wrapper):
        return spec.model_copy(update={"inner": dropping(spec.inner, rate)})
    return spec.model_copy(update={"dropout": rate})


@check(_with_dropout, only=drops)
def check_dropout(case: Case) -> None:
    """The mean over masks is the forward in evaluation, something is dropped, and of a zero update nothing is."""
    layer, x = case.perturbed(), case.inputs()[:1]
    with torch.no_grad():
        expected = layer.eval()(x)
        found = _masked(layer.train(), x)
    spread = found.std(dim=0)
    require(
        size(layer.delta_weight()) == 0 or size(spread) > 1e-12 * size(expected),
        f"{case.piece} drops nothing in training: give site.low_rank its dropout",
    )
    error = (found.mean(dim=0) - expected[0]).abs()
    limit = 7 * spread / _COPIES**0.5 + TOLERANCES[expected.dtype].value * size(expected)
    require(
        bool((error <= limit).all()),
        f"the mean of {case.piece} over {_COPIES} masks is off by {float((error - limit).max()):.3g} "
        "more than chance allows: dropout is scaled wrongly, or drops what is not the generator's own",
    )
    if starts_neutral(case.piece):
        _check_zero_update(case)


def _masked(layer: AdaptedLinear, x: Tensor) -> Tensor:
    """The output for many masks: [copies, ...]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y: Tensor = layer(x.expand(_COPIES, *x.shape[1:]).contiguous())
        return y


def _check_zero_update(case: Case) -> None:
    """Wrappers move, the generator stays at its zero update: nothing is there to be dropped."""
    layer, x = case.start(), case.inputs()
    moved = case.start()
    perturb(moved, case.stream(2))
    with torch.no_grad():
        for part, other in zip(layer.adapter.parts()[:-1], moved.adapter.parts()[:-1], strict=True):
            for name, value in part.values().items():
                value.copy_(other.values()[name])
        layer.refresh()
        expected, found = layer.eval()(x), _masked_once(layer.train(), x)
    limit = TOLERANCES[expected.dtype].value * size(expected)
    differs(found, expected, f"{case.piece} with a zero update in training, against evaluation,", limit)


def _masked_once(layer: AdaptedLinear, x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y: Tensor = layer(x)
        return y
