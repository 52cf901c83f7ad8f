"""The contract of pieces, checked where a piece is registered and used: what it declares, makes and returns, and that
it is pure. A breach is a PieceError: the fault lies with the piece's author, and the sentence says so.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from adapterzoo.errors import PieceError, where
from adapterzoo.factored import FactoredWeight, RightFactor
from adapterzoo.pieces import Generator, Parameters, Piece, Role, Wrapper
from adapterzoo.site import LAYER_TYPES, Site


def declared(kind: type[Piece]) -> str | None:
    """Say what a class's own declarations lack or contradict, as the end of a sentence; None if they are sound."""
    missing = sorted(getattr(kind, "__abstractmethods__", ()))
    if missing:
        return f"it does not define {', '.join(missing)}"
    if kind.roles is Piece.roles or not isinstance(kind.roles, Mapping):
        return "its `roles` must give every parameter a Role, as in roles = {'A': Role.INPUT_FACTOR}; {} if it has none"
    if not all(isinstance(name, str) and isinstance(role, Role) for name, role in kind.roles.items()):
        return "its `roles` must give every parameter a Role, such as Role.INPUT_FACTOR"
    for name in kind.roles:
        if not name.isidentifier():
            return f"the parameter name {name!r} is no plain name, such as 'A'; choose another"
        if name == "inner" or hasattr(torch.nn.Module, name):
            return f"the parameter name {name!r} belongs to every module; choose another"
    if not kind.model_config.get("frozen") or kind.model_config.get("extra") != "forbid":
        return "its specs are not frozen, or take unknown fields; leave model_config as Generator and Wrapper have it"
    lists: dict[str, Any] = {"optional": kind.optional, "shared": kind.shared, "layers": kind.layers}
    for what, names in lists.items():
        if not isinstance(names, (frozenset, set)):
            return f"`{what}` is {names!r}; it should be a frozenset of names"
    lists = {"optional": kind.optional, "shared": kind.shared, "rank_axes": frozenset(kind.rank_axes)}
    for what, names in lists.items():
        if not set(names) <= set(kind.roles):
            return f"`{what}` names {sorted(set(names) - set(kind.roles))}, which `roles` does not declare"
    trained = [name for name in kind.shared if kind.roles[name] is not Role.BUFFER]
    if trained:
        return f"`shared` names {trained[0]!r}, which trains; what layers share is frozen so far: make it a Role.BUFFER"
    mutable = [name for name, field in kind.model_fields.items() if isinstance(field.default, (list, dict, set))]
    if mutable:
        return f"the default of {mutable[0]!r} can be changed, and a spec is frozen; make it a tuple"
    if not set(kind.layers) <= LAYER_TYPES or not kind.layers:
        return f"`layers` is {sorted(kind.layers)}; it should be some of {sorted(LAYER_TYPES)}"
    return None


def initial_values(piece: Piece, site: Site) -> Mapping[str, Tensor]:
    """The initial values that a piece makes, checked against the roles that it declares.

    Raises:
        PieceError: the piece made other parameters than it declares; its author has to mend that.
    """
    with _named(piece, "init", site):
        values = piece.init(site)
    if not isinstance(values, Mapping) or not set(piece.roles) - piece.optional <= set(values) <= set(piece.roles):
        made = sorted(values) if isinstance(values, Mapping) else type(values).__name__
        declares = f"its `roles` declare {sorted(piece.roles)}"
        raise breach(
            piece, f".init made {made}, but {declares}: give every parameter a role, and every role a parameter"
        )
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise breach(piece, f".init made {name} a {type(value).__name__}, not a tensor")
        if value.dim() == 0:
            raise breach(piece, f".init made {name} a tensor without dimensions; make a scalar [1]")
    return values


def made_weight(piece: Piece, inner: FactoredWeight | None, params: Parameters, site: Site) -> FactoredWeight:
    """What a piece's `update` or `condition` returns, checked against the contract.

    Raises:
        PieceError: no normal form, factors of a wrong shape, or a wrapper that lost the dropout of its inside.
    """
    with _named(piece, "update" if inner is None else "condition", site):
        if isinstance(piece, Wrapper) and inner is not None:
            weight = piece.condition(inner, params, site)
        else:
            assert isinstance(piece, Generator)
            weight = piece.update(params, site)
    problem = _breach(weight, site.out_features, site.in_features, inner)
    if problem is not None:
        raise breach(piece, f" on {where(site.layer)} {problem}")
    return weight


def breach(piece: Piece, problem: str) -> PieceError:
    """The error for a piece that breaks the contract: what it did, and whose fault that is."""
    return PieceError(f"{author(piece)}{problem}. The fault is the piece's, and its author's to mend")


def author(piece: Piece) -> str:
    """A piece's class in a sentence about its author, with the module that it is from."""
    return f"{type(piece).__name__} (of {type(piece).__module__})"


@contextmanager
def _named(piece: Piece, function: str, site: Site) -> Iterator[None]:
    """Add to whatever a piece's own function raises whose it is."""
    try:
        yield
    except PieceError as error:
        raise breach(piece, f".{function} on {where(site.layer)}: {error}") from error
    except Exception as error:
        if not getattr(error, "__notes__", None):
            size = list(site.shape[:2])
            error.add_note(f"raised in {author(piece)}.{function}, on {where(site.layer)}, a weight {size}")
        raise


def _breach(weight: object, out: int, cols: int, inner: FactoredWeight | None) -> str | None:
    """What breaks the contract, as the end of a sentence; None if nothing does."""
    if not isinstance(weight, FactoredWeight):
        return f"returned a {type(weight).__name__}; return site.low_rank(U, V) or what inner.mix(...) gives"
    U, V = weight.U, None if weight.V is None else weight.V.value
    if U is not None and V is not None and (U.shape[0] != out or V.shape != (U.shape[1], cols)):
        return f"made U {list(U.shape)} and V {list(V.shape)}; need [{out}, r] and [r, {cols}]"
    if weight.delta is not None and list(weight.delta.shape) not in ([1], [out]):
        return f"made a row gain {list(weight.delta.shape)}; need [{out}] or [1]"
    if weight.remainder is not None and weight.remainder.shape != (out, cols):
        return f"made an update {list(weight.remainder.shape)}; need [{out}, {cols}]"
    for term in weight.structured:
        if term.update.shape != (out, cols):
            return f"made a Kronecker product {list(term.update.shape)}; need [{out}, {cols}]"
    if inner is not None and inner.dropout and not weight.dropout:
        return f"lost its inside's dropout={inner.dropout}: a dense form has none; set it to 0"
    return None


# Note [Purity is tried once]
# A piece that keeps state, draws from the global generator or writes into its parameters breaks caching, merging,
# checkpointing of activations and pairing, all without a sign. So the first time that a class is used in a process its
# functions run once more, and have to give the same. It costs one more initialisation of one layer.
_TRIED: set[type[Piece]] = set()


def is_tried(piece: Piece, site: Site) -> bool:
    """Whether the purity of a piece's class is known, or can't be tried here."""
    return type(piece) in _TRIED or site.base.device.type == "meta" or torch.compiler.is_compiling()


def try_purity(piece: Piece, initial: Mapping[str, Tensor], inner: FactoredWeight | None, site: Site) -> None:
    """Run a piece's functions again on its first layer, and see that nothing differs and nothing is left behind.

    Raises:
        PieceError: something does; its author has to mend that.
    """
    problem = next(_impurities(piece, initial, inner, site), None)
    if problem is not None:
        raise breach(piece, f" is not pure: {problem}")
    _TRIED.add(type(piece))


def _impurities(piece: Piece, initial: Mapping[str, Tensor], inner: FactoredWeight | None, site: Site) -> Iterator[str]:
    options, draws = dict(vars(piece)), torch.random.get_rng_state()
    again = initial_values(piece, site)
    for name, value in initial.items():
        if not _same(value, again[name]):
            yield f"init made another {name!r} the second time; draw with site.normal, site.uniform or kaiming_uniform"
    values = {name: value.detach().clone().to(site.dtype) for name, value in initial.items()}
    function = "update" if inner is None else "condition"
    with torch.no_grad():
        first = made_weight(piece, inner, Parameters(values), site)
        for name, value in values.items():
            if value._version or not _same(initial[name].to(site.dtype), value):
                yield f"{function} writes into its parameter {name!r}; make a new tensor instead"
        if not _same_weight(first, made_weight(piece, inner, Parameters(values), site)):
            yield f"{function} returned something else the second time, with the same parameters"
    if not torch.equal(draws, torch.random.get_rng_state()):
        yield "it draws from torch's global generator; draw in init, with site.normal, site.uniform or kaiming_uniform"
    if vars(piece) != options:
        yield f"its functions change the spec itself: {sorted(set(vars(piece)) ^ set(options)) or 'a field'}"


def _same_weight(left: FactoredWeight, right: FactoredWeight) -> bool:
    return all(_same(getattr(left, name), getattr(right, name)) for name in ("delta", "U", "V", "remainder"))


def _same(left: Any, right: Any) -> bool:
    """Whether two values are the same: bit for bit on a processor, to round-off where sums come in any order."""
    if isinstance(left, RightFactor) and isinstance(right, RightFactor):
        left, right = left.value, right.value
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return left is right
    if left.device.type != "cpu":
        return left.shape == right.shape and torch.allclose(left, right, rtol=1e-4, equal_nan=True)
    return left.shape == right.shape and bool(((left == right) | (left.isnan() & right.isnan())).all())
