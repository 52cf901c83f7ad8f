"""Where a composition starts: at W' = W, exactly, from where it can train."""

import torch

from adapterzoo.adapter import Adapter
from adapterzoo.layer import AdaptedLinear
from adapterzoo.testing.case import Case
from adapterzoo.testing.check import check, everywhere
from adapterzoo.testing.comparing import differs, same_bits
from adapterzoo.testing.failure import require
from adapterzoo.testing.parts import starts_neutral
from adapterzoo.testing.truth import Truth


@check(everywhere)
def check_start(case: Case) -> None:
    """It starts at W' = W, exactly, if it says so; its first gradients are finite, and the generator's not all zero."""
    for family in ("plain", "zero row"):
        layer = case.with_family(family).start()
        if starts_neutral(case.piece):
            _check_neutral(case, layer)
        else:
            truth = Truth(layer, case.inputs(), case.functional(layer(case.inputs())))
            limit = truth.limit("weight", truth.weight_scale())
            differs(
                layer.effective_weight(), layer.form.stored(truth.found["weight"]), f"the start of {case.piece}", limit
            )
        _check_first_gradients(case, layer, family)


def _check_neutral(case: Case, layer: AdaptedLinear) -> None:
    require(bool(layer.delta_weight().isfinite().all()), f"W' of {case.piece} is not finite at the start")
    largest = float(layer.delta_weight().detach().abs().max())
    require(
        largest == 0,
        f"{case.piece} starts {largest:.3g} away from W; make the difference exactly zero, or declare "
        "starts_neutral = False",
    )
    same_bits(layer.effective_weight(), layer.weight, f"{case.piece} starts at another weight than W")
    weight = layer.factored_weight()
    require(not weight.update_norm().any(), f"{case.piece} starts with an update norm that is not zero")


def _check_first_gradients(case: Case, layer: AdaptedLinear, family: str) -> None:
    y = layer(case.inputs())
    require(bool(torch.isfinite(y).all()), f"the first output of {case.piece} is not finite")
    if not y.requires_grad:
        return  # nothing trains
    (y * case.functional(y)).sum().backward()
    for name, value in layer.adapter.named_parameters():
        finite = value.grad is None or bool(value.grad.isfinite().all())
        require(finite, f"the first gradient of {name} of {case.piece} is not finite")
    if family == "plain" and min(case.weight_shape[:2]) > 1:  # one output, say, has nothing to rotate
        require(_moves(layer.adapter), f"{case.piece} starts where every gradient is zero, so it can't train")
        generator = layer.adapter.generator
        name = type(generator.spec).__name__
        require(
            _moves(generator) or not list(generator.parameters()),
            f"{case.piece} starts where {name} gets no gradient, and stays there",
        )


def _moves(adapter: Adapter) -> bool:
    """Whether any parameter has a gradient that is not zero."""
    return any(value.grad is not None and bool(value.grad.any()) for value in adapter.parameters())
