"""Where initial values come from."""

from dataclasses import replace

import torch

from adapterzoo.layer import AdaptedLinear
from adapterzoo.testing.case import NAME, Case
from adapterzoo.testing.check import check, everywhere, generator_of
from adapterzoo.testing.comparing import differs, same_bits, size


@check(everywhere)
def check_draws(case: Case) -> None:
    """A generator starts equal under every wrapper and in every dtype, and the global generator is left alone."""
    state = torch.random.get_rng_state()
    layer = case.start()
    same_bits(torch.random.get_rng_state(), state, f"{case.piece} draws from torch's global generator")
    generator = layer.adapter.generator
    alone = AdaptedLinear(case.base(), generator.spec, seed=case.seed, name=NAME)
    short = AdaptedLinear(replace(case, dtype="float32").base(), generator.spec, seed=case.seed, name=NAME)
    name = type(generator.spec).__name__
    for parameter, value in alone.adapter.values().items():
        found = generator.values()[parameter]
        same_bits(found, value, f"{parameter} of {name} starts at other values inside {case.piece} than alone")
        narrow = short.adapter.values()[parameter]
        limit = 1e-3 * size(value) + 1e-6
        differs(narrow, value, f"the start of {parameter} of {name} in float32, against float64,", limit)
    again = case.start()
    for parameter, value in again.adapter.state_dict().items():
        same_bits(layer.adapter.state_dict()[parameter], value, f"{parameter} starts at other values the second time")
    assert generator_of(case) == generator.spec
