"""Gradients with the gains of normalising wrappers held: what the importance of a number is measured with.

Note [Importance with gains held]
    A wrapper that divides by a norm of its inside turns the gradient of the inside's numbers: over MAP the loss does
    not change with the length of Δ, so Σ λ_i ∂L/∂λ_i = 0 and with two triplets both would always seem to matter
    alike; a triplet that is nearly all of Δ would seem to matter least. What a triplet is worth is what the loss loses
    when its own term leaves W' and all else in W' stays. That is its derivative with the wrappers' gains held:
    magnitudes m follow the norms n, m ∝ n, so that m / n stays. By the chain rule it is the gradient at hand plus
    Σ ∂L/∂m · m/n · ∂n/∂w, and so it needs nothing but gradients that training has anyway, summed over processes and
    micro-batches, clipped and unscaled as they are. Where m has no gradient it can't be known: a warning says so.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from adapterzoo.adapter import Adapter
from adapterzoo.layer import AdaptedLinear
from adapterzoo.pieces import Generator, Parameters, Site, Wrapper
from adapterzoo.precision import full_precision
from adapterzoo.sharded import gathered, sharded_like


class Pull(NamedTuple):
    """What held gains add to the gradients of a generator.

    Args:
        grads: the addition, by the parameter's name; empty where no gain follows a norm.
        unknown: magnitudes that would be needed, and have no gradient.
    """

    grads: Mapping[str, Tensor]
    unknown: tuple[str, ...]


NO_PULL = Pull({}, ())


def pull_of_norms(layer: AdaptedLinear) -> Pull:
    """Σ ∂L/∂m · m/n · ∂n/∂w for each parameter w of a layer's generator."""
    *wrappers, generator = layer.adapter.parts()
    if not any(_normalises(part) for part in wrappers):
        return NO_PULL
    with full_precision(layer.weight.device.type), torch.enable_grad():
        site = layer.site()
        leaves = _whole(generator, site)
        wanted = {name: leaves[name].requires_grad_() for name, _ in generator.named_parameters(recurse=False)}
        pull, unknown = _pull(wrappers, generator, leaves, site)
        if not pull.requires_grad:
            return Pull({}, unknown)
        found = torch.autograd.grad(pull, list(wanted.values()), allow_unused=True)
    own = generator.values()
    grads = {name: grad for name, grad in zip(wanted, found, strict=True) if grad is not None}
    return Pull({name: sharded_like(grad.to(own[name].dtype), own[name]) for name, grad in grads.items()}, unknown)


def _pull(
    wrappers: list[Adapter], generator: Adapter, leaves: Mapping[str, Tensor], site: Site
) -> tuple[Tensor, tuple[str, ...]]:
    """Σ ∂L/∂m · m n / n₀ over the wrappers' magnitudes, as a function of the generator's parameters; what it lacks."""
    assert isinstance(generator.spec, Generator)
    weight = generator.spec.update(Parameters(leaves), replace(site, depth=0))
    pull, unknown = torch.zeros((), device=site.base.device), []
    for part in reversed(wrappers):
        assert isinstance(part.spec, Wrapper)
        values, here = _whole(part, site), replace(site, depth=part.spec.depth)
        held = part.spec.held_magnitudes(weight, Parameters(values), here)
        for name, value in held.items():
            grad = part.values()[name].grad
            if grad is None:
                unknown.append(f"{name} of {type(part.spec).__name__}")
            else:
                pull = pull + (gathered(grad).to(value.dtype) * value).sum()
        weight = part.spec.condition(weight, Parameters({**values, **held}), here)
    return pull, tuple(unknown)


def _normalises(part: Adapter) -> bool:
    assert isinstance(part.spec, Wrapper)
    return type(part.spec).held_magnitudes is not Wrapper.held_magnitudes


def _whole(part: Adapter, site: Site) -> dict[str, Tensor]:
    """Copies of a piece's own values, whole, in the dtype of factors, without a graph."""
    return {name: gathered(value.detach()).to(site.dtype, copy=True) for name, value in part.values().items()}
