"""Wrappers around what was read: which, and from where they start."""

from collections.abc import Callable

import torch

from adapterzoo.adapter import Adapter
from adapterzoo.errors import SpecError
from adapterzoo.factored import FactoredWeight
from adapterzoo.layer import AdaptedLinear
from adapterzoo.pieces import Piece, Wrapper, check_is_spec, layers_of
from adapterzoo.precision import full_precision
from adapterzoo.registry import parse
from adapterzoo.sharded import write

_PLACE = "{spec}"
_TOLERANCE = 1e-5


def wrapped(spec: Piece, wrap: str | Callable[[Piece], Piece] | None) -> Piece:
    """What wrap makes of a spec.

    Raises:
        SpecError: no spec with the given one inside.
    """
    if wrap is None:
        return spec
    if isinstance(wrap, str) and _PLACE not in wrap:
        raise SpecError(f'wrap={wrap!r} has no {_PLACE} in it; wrap="MAP({_PLACE})" puts what was read into a MAP')
    found = parse(wrap.replace(_PLACE, repr(spec))) if isinstance(wrap, str) else wrap(spec)
    chain = layers_of(check_is_spec(found, "wrap returns a spec"))
    depth = len(layers_of(spec))
    if len(chain) < depth or chain[-depth] != spec:
        raise SpecError(f"wrap made {found!r} of {spec!r}; it should be that very spec, or wrappers around it")
    return found


@torch.no_grad()
def start_from(layer: AdaptedLinear, inside: Adapter) -> str | None:
    """Let the wrappers around an inside begin with its function; say why if one of them can't."""
    with full_precision(layer.weight.device.type):
        site = layer.site()
        outside = [part for part in layer.adapter.parts() if part.spec.depth > inside.spec.depth]
        for part in reversed(outside):
            assert part.inner is not None
            assert isinstance(part.spec, Wrapper)
            for name, value in part.spec.neutral_magnitudes(part.inner.weight(site), site).items():
                write(part.values()[name], value)
        layer.refresh()
        if not outside or _is_near(layer.adapter.weight(site), inside.weight(site)):
            return None
    return (
        f"{layer.name}: {layer.spec!r} does not start with the function of {inside.spec!r}, and where it would is not "
        "known; import without wrap, merge, and adapt the merged model with it"
    )


def _is_near(found: FactoredWeight, wanted: FactoredWeight) -> bool:
    update, other = wanted.dense_update(), found.dense_update()
    return bool((other - update).norm() <= _TOLERANCE * update.norm() + 1e-7 * wanted.base.row_norms_sq().sum().sqrt())
