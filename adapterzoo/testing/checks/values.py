"""Values and gradients against the slow truths."""

import torch

from adapterzoo.testing.case import Case
from adapterzoo.testing.check import check, everywhere
from adapterzoo.testing.comparing import differs
from adapterzoo.testing.failure import require
from adapterzoo.testing.truth import Truth


@check(everywhere)
def check_values(case: Case) -> None:
    """W', W' − W and the forward are what the slow truths say, with every parameter away from its start."""
    layer, x = case.perturbed().eval(), case.inputs()
    y = layer(x)
    truth = Truth(layer, x, case.functional(y))
    stored, scale = layer.form.stored, truth.weight_scale()
    differs(
        layer.effective_weight(), stored(truth.found["weight"]), f"W' of {case.piece}", truth.limit("weight", scale)
    )
    differs(
        layer.delta_weight(), stored(truth.found["update"]), f"W' − W of {case.piece}", truth.limit("update", scale)
    )
    require(y.dtype == layer.weight.dtype, f"the forward of {case.piece} returns {y.dtype} for {layer.weight.dtype}")
    differs(y, truth.found["forward"], f"the forward of {case.piece}", truth.limit("forward", truth.output_scale()))


@check(everywhere)
def check_gradients(case: Case) -> None:
    """Gradients of every parameter and of the input are autograd's through the slow truths."""
    layer, x = case.perturbed().eval(), case.inputs()
    x = x.requires_grad_() if x.is_floating_point() else x
    y = layer(x)
    functional = case.functional(y)
    truth = Truth(layer, x, functional)
    if y.requires_grad:
        (y * functional.to(y.dtype)).sum().backward()
    if x.grad is not None:
        name = "gradient of x"
        differs(x.grad, truth.found[name], f"the {name} through {case.piece}", truth.limit(name, truth.x_scale(), True))
    for parameter, value in layer.adapter.named_parameters():
        name = f"gradient of {parameter}"
        gradient = torch.zeros_like(value) if value.grad is None else value.grad
        limit = truth.limit(name, truth.gradient_scale(parameter), True)
        differs(gradient, truth.found[name], f"the {name} of {case.piece}", limit)
