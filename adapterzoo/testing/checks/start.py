"""Where a composition starts: at W' = W, exactly, from where it can train."""

import torch

from adapterzoo.layer import AdaptedLinear
from adapterzoo.testing.case import Case
from adapterzoo.testing.check import check, everywhere
from adapterzoo.testing.comparing import differs, same_bits
from adapterzoo.testing.failure import require
from adapterzoo.testing.parts import starts_neutral
from adapterzoo.testing.truth import Truth


@check(everywhere)
def check_start(case: Case) -> None:
    """It starts at W' = W, exactly, if it says so; its first gradients are finite, and not all zero."""
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
    gradients = {name: value.grad for name, value in layer.adapter.named_parameters()}
    for name, gradient in gradients.items():
        require(gradient is None or bool(gradient.isfinite().all()), f"the first gradient of {name} is not finite")
    # One output, say, has nothing to rotate.
    require(
        family != "plain"
        or min(case.weight_shape[:2]) == 1
        or any(gradient is not None and bool(gradient.any()) for gradient in gradients.values()),
        f"{case.piece} starts where every gradient is zero, so it can't train",
    )
