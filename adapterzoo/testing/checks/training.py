"""What a piece says for training: penalties, ranks, and magnitudes that leave a trained inside as it is."""

import torch

from adapterzoo.adapter import Adapter
from adapterzoo.pieces import Generator, Parameters, Wrapper
from adapterzoo.rules import StepRule
from adapterzoo.site import Site
from adapterzoo.testing.case import Case
from adapterzoo.testing.check import check, everywhere, is_wrapper
from adapterzoo.testing.comparing import differs, size
from adapterzoo.testing.failure import require
from adapterzoo.testing.parts import sites_of


@check(everywhere, only=is_wrapper)
def check_neutral(case: Case) -> None:
    """With its initial values, and its neutral_magnitudes, a wrapper leaves a trained inside as it is."""
    layer = case.perturbed()
    for part, site in sites_of(layer):
        if isinstance(part.spec, Wrapper) and part.inner is not None and part.spec.starts_neutral:
            _check_neutral(part.spec, part.inner, layer.site(), site)


def _check_neutral(spec: Wrapper, inside: Adapter, outer: Site, site: Site) -> None:
    with torch.no_grad():
        inner = inside.weight(outer)
        neutral = spec.neutral_magnitudes(inner, site)
        name, initial = type(spec).__name__, spec.init(site)
        require(set(neutral) <= set(initial), f"{name}.neutral_magnitudes names {sorted(set(neutral) - set(initial))}")
        weight = spec.condition(inner, Parameters({**initial, **neutral}), site).dense()
        expected = inner.dense()
        limit = 1e-9 * (size(expected) + size(site.base.dense()))
    what = "initial values and neutral_magnitudes" if neutral else "initial values (it has no neutral_magnitudes)"
    differs(weight, expected, f"W' of {name} over a trained inside, with its {what}, against that inside,", limit)


@check(everywhere)
def check_training(case: Case) -> None:
    """A penalty is a finite number, held magnitudes are the magnitudes as they stand, ranks are counted."""
    layer = case.perturbed()
    for part, site in sites_of(layer):
        spec, params, name = part.spec, Parameters(part.values()), type(part.spec).__name__
        penalty = spec.penalty(params, 2)
        if penalty is not None:
            require(penalty.shape == () and bool(penalty.isfinite()), f"{name}.penalty is {penalty}, not a finite []")
        rule = spec.step_rule()
        require(rule is None or isinstance(rule, StepRule), f"{name}.step_rule gives a {type(rule).__name__}")
        if spec.rank_axes:
            kept, axes = spec.kept_ranks(params), spec.rank_axes
            sizes = {part.values()[parameter].shape[axis] for parameter, axis in axes.items()}
            require(sizes == {len(kept)}, f"{name}.kept_ranks gives {len(kept)}, and its parameters have {sizes} ranks")
            require(kept.dtype == torch.bool, f"{name}.kept_ranks is {kept.dtype}, not bool")
        if isinstance(spec, Wrapper) and part.inner is not None:
            _check_held(part, part.inner, layer.site(), site)
        else:
            assert isinstance(spec, Generator)


def _check_held(part: Adapter, inside: Adapter, outer: Site, site: Site) -> None:
    assert isinstance(part.spec, Wrapper)
    held = part.spec.held_magnitudes(inside.weight(outer), Parameters(part.values()), site)
    for name, value in held.items():
        require(name in part.roles, f"{type(part.spec).__name__}.held_magnitudes names {name}, which it has not")
        own = part.values()[name]
        differs(value, own, f"{name} of held_magnitudes, against {name} as it stands,", 1e-9 * size(own))
