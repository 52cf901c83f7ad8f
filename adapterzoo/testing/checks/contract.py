"""The contract itself: what a class declares, what its functions make, and that they are pure."""

import torch

from adapterzoo.contract import author, declared, initial_values, made_weight, try_purity
from adapterzoo.errors import PieceError, SpecError
from adapterzoo.layer import AdaptedLinear
from adapterzoo.pieces import Parameters, Wrapper
from adapterzoo.registry import from_json, parse, to_json
from adapterzoo.testing.case import Case, perturb
from adapterzoo.testing.check import by_itself, check, everywhere
from adapterzoo.testing.comparing import same_bits
from adapterzoo.testing.failure import CheckFailedError, require
from adapterzoo.testing.parts import sites_of


@check(by_itself)
def check_contract(case: Case) -> None:
    """The class declares what it makes: roles, shapes, dtypes; specs are frozen."""
    layer = case.start()
    for part, site in sites_of(layer):
        spec, name = part.spec, type(part.spec).__name__
        problem = declared(type(spec))
        require(problem is None, f"{name}: {problem}")
        for parameter, value in initial_values(spec, site).items():
            require(value.dtype == site.dtype, f"{name}.init made {parameter} in {value.dtype}; build it in site.dtype")
            require(value.device == site.base.device, f"{name}.init made {parameter} on {value.device}, not the base's")
            require(not value.requires_grad, f"{name}.init made {parameter} with a graph; initial values have none")
        _check_frozen(part.spec)


def _check_frozen(spec: object) -> None:
    name = type(spec).__name__
    for field in getattr(type(spec), "model_fields", {}):
        try:
            setattr(spec, field, getattr(spec, field))
        except SpecError:
            continue
        raise CheckFailedError(
            f"{name} lets {field} be set; specs are frozen: leave model_config and __setattr__ alone"
        )
    require(hash(spec) == hash(spec), f"{name} has no steady hash")


@check(by_itself)
def check_purity(case: Case) -> None:
    """The functions are pure: the same again from the same, nothing written, drawn or kept."""
    layer = case.start()
    state = torch.random.get_rng_state()
    for part, site in sites_of(layer):
        inner = None if part.inner is None else part.inner.weight(layer.site())
        try:
            try_purity(part.spec, initial_values(part.spec, site), inner, site)
        except PieceError as error:
            raise CheckFailedError(str(error)) from None
    same_bits(torch.random.get_rng_state(), state, f"{case.piece} draws from torch's global generator")
    _check_nothing_is_kept(case, layer)


def _check_nothing_is_kept(case: Case, layer: AdaptedLinear) -> None:
    """W' of some values, of others, and of the first again; with a graph and without."""
    first = {name: value.clone() for name, value in layer.adapter.state_dict().items()}
    with torch.no_grad():
        start = layer.effective_weight().clone()
    graph = layer.effective_weight()
    same_bits(graph, start, f"{case.piece} makes another weight where gradients are recorded")
    perturb(layer, case.stream(5))
    with torch.no_grad():
        layer.effective_weight()
        for name, value in layer.adapter.state_dict().items():
            value.copy_(first[name])
        layer.refresh()
        same_bits(layer.effective_weight(), start, f"{case.piece} remembers other parameters than it is given")
        for part, site in sites_of(layer):
            values = {name: value.clone() for name, value in part.values().items()}
            inner = None if part.inner is None else part.inner.weight(layer.site())
            made_weight(part.spec, inner, Parameters(values), site)
            for name, value in part.values().items():
                same_bits(values[name], value, f"{author(part.spec)} writes into its parameter {name!r}")


@check(everywhere)
def check_text(case: Case) -> None:
    """The spec survives text and JSON, and refuses what it does not know."""
    spec = case.piece
    read = {"repr": (repr(spec), parse(repr(spec))), "to_json": (to_json(spec), from_json(to_json(spec)))}
    for what, (text, again) in read.items():
        require(again == spec, f"what {what} writes, {text}, is read as {again!r}")
        require(hash(again) == hash(spec), f"{spec!r}, read back from {what}, has another hash")
    inside = {"inner": spec.inner} if isinstance(spec, Wrapper) else {}
    try:
        type(spec)(**inside, no_such_option=1)
    except SpecError:
        return
    raise CheckFailedError(f"{type(spec).__name__} takes no_such_option=1 without a word")
