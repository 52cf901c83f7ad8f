"""Narrow weights, and quantised ones."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from adapterzoo.factored import FactoredWeight
from adapterzoo.testing.case import Case
from adapterzoo.testing.check import check, everywhere
from adapterzoo.testing.checks.values import check_gradients, check_values
from adapterzoo.testing.drawing import alone, layers_for
from adapterzoo.testing.failure import require
from adapterzoo.testing.options import Choose
from adapterzoo.testing.subject import Subject


def _narrow(subject: Subject, choose: Choose) -> Iterator[Case]:
    """Half of the cases in float32, half in bfloat16; and those of quantised layers.

    Not those of one row or column: norms of single numbers leave so little that few digits of it are certain.
    """
    cases = [case for case in everywhere(subject, choose) if min(case.weight_shape[:2]) > 1]
    for number, case in enumerate(cases):
        yield replace(case, dtype=("float32", "bfloat16")[number % 2])
    for case in alone(subject, choose, layers_for(subject, exact=False)):
        yield replace(case, dtype="float32")


@check(_narrow)
def check_dtypes(case: Case) -> None:
    """On float32, bfloat16 and quantised weights the values and gradients are near those of the float64 truth."""
    layer = case.perturbed().eval()
    for name, value in layer.adapter.state_dict().items():
        require(value.dtype == torch.float32, f"{name} of {case.piece} is {value.dtype} on a {case.dtype} weight")
    weight = layer.factored_weight()
    for what, factor in _factors(weight):
        found = torch.float32 if factor is None else factor.dtype
        require(
            found == torch.float32, f"{case.piece} makes {what} in {found}; build it in site.dtype, {torch.float32}"
        )
    check_values.of(case)
    check_gradients.of(case)


def _factors(weight: FactoredWeight) -> list[tuple[str, Tensor | None]]:
    """The tensors of a normal form by their names in the algebra."""
    V = None if weight.V is None else weight.V.value
    return [("δ", weight.delta), ("U", weight.U), ("V", V), ("D", weight.remainder)]
