"""Merging and back."""

import torch

from adapterzoo.testing.case import Case
from adapterzoo.testing.check import check, everywhere
from adapterzoo.testing.comparing import TOLERANCES, differs, same_bits, size


@check(everywhere)
def check_merge(case: Case) -> None:
    """Merging leaves the forward as it was, and unmerging gives the base weight back bit for bit."""
    layer, x = case.perturbed().eval(), case.inputs()
    weight, effective = layer.weight.detach().clone(), layer.effective_weight().detach()
    before = layer(x).detach()
    with torch.no_grad():
        layer.merge()
        after = layer(x)
        same_bits(layer.weight, effective, f"what a merge of {case.piece} stores is not effective_weight()")
        same_bits(layer.state_dict()["weight"], weight, f"merged, {case.piece} saves another weight than the base's")
        scale = size(before) + size(layer.form.plain(x, weight, None))
        differs(after, before, f"the merged forward of {case.piece}", TOLERANCES[weight.dtype].value * scale)
        layer.unmerge()
        same_bits(layer.weight, weight, f"unmerging {case.piece} does not give the base weight back")
        again = layer(x)
    differs(again, before, f"the forward of {case.piece} after unmerging", TOLERANCES[weight.dtype].value * scale)
