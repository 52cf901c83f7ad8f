"""What a wrapper's method promises of W'."""

import torch

from adapterzoo.pieces import Parameters, Wrapper
from adapterzoo.testing.case import Case
from adapterzoo.testing.check import check, everywhere, is_wrapper
from adapterzoo.testing.comparing import differs, size
from adapterzoo.testing.parts import sites_of


@check(everywhere, only=is_wrapper)
def check_promises(case: Case) -> None:
    """What a wrapper promises of W' holds, over whatever it wraps."""
    layer = case.perturbed()
    with torch.no_grad():
        for part, site in sites_of(layer):
            if part.inner is None or not isinstance(part.spec, Wrapper):
                continue
            inner, weight = part.inner.weight(layer.site()).dense(), part.weight(layer.site()).dense()
            promises = part.spec.promises(inner, weight, Parameters(part.values()), site)
            for sentence, (left, right) in promises.items():
                limit = 1e-9 * (size(right) + 1e-3 * size(weight))
                differs(left, right, f"{type(part.spec).__name__} promises: {sentence}. It", limit)
