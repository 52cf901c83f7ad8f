"""torch.compile."""

import warnings

import torch

from adapterzoo.testing.case import Case
from adapterzoo.testing.check import check, once
from adapterzoo.testing.comparing import TOLERANCES, differs, size
from adapterzoo.testing.failure import CheckFailedError, require


@check(once)
def check_compile(case: Case) -> None:
    """torch.compile makes one graph of it, which gives the same output and gradients."""
    eager, compiled, x = case.perturbed().eval(), case.perturbed().eval(), case.inputs()
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Dynamo warns of every autograd.Function that it traces
        try:
            found = torch.compile(compiled, backend="aot_eager", fullgraph=True)(x)
        except Exception as error:
            first = str(error).strip().splitlines()[0]
            raise CheckFailedError(f"{case.piece} can't be compiled to one graph: {first}") from error
        expected = eager(x)
        if expected.requires_grad:
            functional = case.functional(expected).to(expected.dtype)
            (found * functional).sum().backward()
            (expected * functional).sum().backward()
    tolerance = TOLERANCES[expected.dtype]
    differs(found, expected, f"the compiled forward of {case.piece}", tolerance.value * size(expected))
    for (name, one), (_, other) in zip(
        compiled.adapter.named_parameters(), eager.adapter.named_parameters(), strict=True
    ):
        if one.grad is None or other.grad is None:  # without effect, as a rotation of blocks of one
            require(one.grad is other.grad, f"{name} of {case.piece} has a gradient only with or only without compile")
            continue
        limit = tolerance.gradient * (size(other.grad) + 1e-3 * size(functional))
        differs(one.grad, other.grad, f"the compiled gradient of {name} of {case.piece}", limit)
    torch.compiler.reset()
