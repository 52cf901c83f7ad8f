"""Gradients with the gains of normalising wrappers held: what the importance of a number is measured with.

Note [Importance with gains held]
    A wrapper that divides by a norm of its inside turns the gradient of the inside's numbers: over MAP the loss does
    not change with the length of Δ, so Σ λ_i ∂L/∂λ_i = 0 and with two triplets both would always seem to matter
    alike; a triplet that is nearly all of Δ would seem to matter least. What a triplet is worth is what the loss loses
    when its own term leaves W' and all else in W' stays. That is its derivative with the wrappers' gains held:
    magnitudes m follow the norms n, m ∝ n, so that m / n stays. By the chain rule it is the gradient at hand plus
    Σ ∂L/∂m · m/n · ∂n/∂w, and so it needs nothing but gradients that training has anyway, summed over processes and
    micro-batches, clipped and unscaled as they are.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from adapterzoo.adapter import Adapter
from adapterzoo.base import DenseBase
from adapterzoo.kept import NormCache
from adapterzoo.layer import AdaptedLinear
from adapterzoo.pieces import Generator, Parameters, Role, Site, Wrapper
from adapterzoo.precision import full_precision
from adapterzoo.sharded import gathered, is_sharded, sharded_like


def pull_of_norms(layer: AdaptedLinear) -> Mapping[str, Tensor]:
    """Σ ∂L/∂m · m/n · ∂n/∂w for each parameter w of the generator, by name; empty where no gain follows a norm."""
    *wrappers, generator = layer.adapter.parts()
    if not any(_normalises(part) for part in wrappers):
        return {}
    with full_precision(layer.weight.device.type), torch.enable_grad():
        site = _whole_site(layer)
        leaves = {n: v.requires_grad_(generator.spec.roles[n] is not Role.BUFFER) for n, v in _whole(generator).items()}
        pull = _pull(wrappers, generator, leaves, site)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not pull.requires_grad:
        return {}
    found = torch.autograd.grad(pull, list(wanted.values()), allow_unused=True)
    own = generator.values()
    return {
        name: sharded_like(grad.to(own[name].dtype), own[name])
        for name, grad in zip(wanted, found, strict=True)
        if grad is not None
    }


def _pull(wrappers: list[Adapter], generator: Adapter, leaves: Mapping[str, Tensor], site: Site) -> Tensor:
    """Σ ∂L/∂m · m n / n₀ over the wrappers' magnitudes, as a function of the generator's parameters."""
    assert isinstance(generator.spec, Generator)
    weight = generator.spec.update(Parameters(leaves), replace(site, depth=0))
    pull = torch.zeros(())
    for part in reversed(wrappers):
        assert isinstance(part.spec, Wrapper)
        values, here = _whole(part), replace(site, depth=part.spec.depth)
        held = part.spec.held_magnitudes(weight, Parameters(values), here)
        for name, value in held.items():
            grad = part.values()[name].grad
            if grad is not None:
                pull = pull.to(value.device) + (gathered(grad).to(value.dtype) * value).sum()
        weight = part.spec.condition(weight, Parameters({**values, **held}), here)
    return pull


def _normalises(part: Adapter) -> bool:
    assert isinstance(part.spec, Wrapper)
    return type(part.spec).held_magnitudes is not Wrapper.held_magnitudes


def _whole(part: Adapter) -> dict[str, Tensor]:
    """A piece's own values, whole, in the dtype of factors, without a graph."""
    return {
        name: gathered(value.detach()).to(torch.promote_types(value.dtype, torch.float32)).clone()
        for name, value in part.values().items()
    }


def _whole_site(layer: AdaptedLinear) -> Site:
    if not is_sharded(layer.weight):
        return layer.site()
    return replace(layer.site(), base=DenseBase(gathered(layer.weight.detach()), NormCache()))
