"""Names to pieces: registration, text (`parse`) and JSON. Text is read by a grammar; nothing is ever evaluated."""

import ast
import json
import sys
from collections.abc import Callable, Mapping
from threading import RLock
from typing import Any, TypeVar

from adapterzoo.contract import declared
from adapterzoo.errors import NameTakenError, PieceError, SpecError, UnknownPieceError
from adapterzoo.installed import Offer, load, offers, package_of, reason
from adapterzoo.pieces import Generator, Piece, Wrapper

SCHEMA = 1
"""Version of the JSON form of a spec."""

_PIECES: dict[str, type[Piece]] = {}
_COMPOSITIONS: dict[str, Callable[..., Piece]] = {}
_LONGEST_TEXT = 10_000

# Note [Pieces of installed packages]
# They are looked for when a name is asked for that nobody knows, and when all names are: importing adapterzoo imports
# no other package. An offer that fails breaks no other name, and leaves none of its own. Where two packages offer one
# name nobody gets it: else the order would decide what a file means. What a program imports itself is its choice.
_TRIED: dict[Offer, str] = {}  # why it could not be loaded, "" if it could
_FOUND: dict[str, Any] = {}  # what was registered while offers were loaded
_DISPUTED: dict[str, str] = {}
_LOADING = "it is being loaded"
_LOOKING = RLock()

P = TypeVar("P", bound=type[Piece])
C = TypeVar("C", bound=Callable[..., Piece])


def register(kind: P) -> P:
    """Make a generator or wrapper known by its class name (a class decorator).

    Raises:
        PieceError: the class is no Generator or Wrapper, declares something unsound (`contract`), or its name is taken.
    """
    name = kind.__name__
    if not (isinstance(kind, type) and issubclass(kind, (Generator, Wrapper))):
        raise PieceError(f"{name} can't be registered: derive it from adapterzoo.pieces.Generator or Wrapper")
    problem = declared(kind)
    if problem is not None:
        raise PieceError(f"{name} can't be registered: {problem}")
    _claim(name, kind)
    _PIECES[name] = kind
    return kind


def composition(function: C) -> C:
    """Make a function that returns a spec known to `parse` by its name (a decorator)."""
    _claim(function.__name__, function)
    _COMPOSITIONS[function.__name__] = function
    return function


def piece(name: str) -> type[Piece]:
    """The registered class of that name.

    Raises:
        UnknownPieceError: no such name; lists the known ones and the nearest.
        PieceError: two installed packages offer that name.
    """
    if name not in _PIECES:
        _look_around()
    if name not in _PIECES:
        raise _unknown(name, _PIECES)
    return _PIECES[name]


def pieces() -> dict[str, type[Piece]]:
    """Every piece by name: those of adapterzoo, those that the program registered, those of installed packages."""
    _look_around()
    return dict(_PIECES)


def compositions() -> dict[str, Callable[..., Piece]]:
    """Every named composition by name, from wherever `pieces` are."""
    _look_around()
    return dict(_COMPOSITIONS)


def broken() -> list[str]:
    """Installed packages that offer pieces and can't be loaded, each with the reason."""
    _look_around()
    return _broken()


def parse(text: str) -> Piece:
    """Read a spec from text such as `MAP(AdaLoRA(r=16))`, the inverse of `repr`.

    The grammar is: a spec is a name and, in brackets, at most one spec (the inside) and then `field=value` pairs;
    a value is a number, a string, True, False, None or a tuple of values. Nothing is evaluated.

    Args:
        text: the spec.

    Returns:
        The spec.

    Raises:
        UnknownPieceError: a name that is not registered.
        SpecError: the text is no spec, or a field has a bad value.

    Example:
        >>> import adapterzoo as az
        >>> az.parse("MAP(AdaLoRA(r=16))") == az.MAP(az.AdaLoRA(r=16))
        True
    """
    if not isinstance(text, str):
        raise SpecError(f"parse reads text such as 'MAP(LoRA(r=8))', not {type(text).__name__}")
    if len(text) > _LONGEST_TEXT:
        raise SpecError(f"a spec of {len(text)} characters is refused; the longest is {_LONGEST_TEXT}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return _read_spec(tree, text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, SpecError):
            raise
        why = error.msg if isinstance(error, SyntaxError) else error
        raise SpecError(f"{_short(text)} is not a spec such as MAP(LoRA(r=8)): {why}") from None


def to_json(spec: Piece) -> str:
    """Write a spec as JSON with its schema version; every field is written, so defaults may change later.

    Example:
        >>> import adapterzoo as az
        >>> print(az.to_json(az.PreDiag(az.FLoRA(r=(4, 2)))))
        {"schema": 1, "piece": "PreDiag", "inner": {"piece": "FLoRA", "r": [4, 2], "scale": 1.0, "dropout": 0.0}}
    """
    return json.dumps({"schema": SCHEMA, **_to_tree(spec)})


def from_json(text: str) -> Piece:
    """Read a spec from JSON as `to_json` writes it.

    Raises:
        UnknownPieceError: a name that is not registered.
        SpecError: no JSON, another schema version, an unknown field or a bad value.
    """
    if not isinstance(text, str):
        raise SpecError(f"from_json reads text, not {type(text).__name__}")
    try:
        tree = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"not JSON: {error}") from None
    if not isinstance(tree, dict) or type(tree.get("schema")) is not int or tree["schema"] != SCHEMA:
        found = repr(tree.get("schema", "no schema")) if isinstance(tree, dict) else type(tree).__name__
        raise SpecError(f'a spec in JSON is an object with "schema": {SCHEMA}; found {found[:80]}')
    try:
        return _from_tree({key: value for key, value in tree.items() if key != "schema"})
    except RecursionError:
        raise SpecError("a spec that is nested this deeply is refused") from None


def _claim(name: str, owner: Any) -> None:
    holder: Any = _PIECES.get(name) or _COMPOSITIONS.get(name) or (_FOUND.get(name) if _is_looking() else None)
    again = (owner.__module__, owner.__qualname__)  # a notebook's cell, run twice
    if holder is not None and (holder.__module__, holder.__qualname__) != again:
        raise NameTakenError(name, _whose(holder), _whose(owner), f"give {owner.__module__}.{name} another name")
    _DISPUTED.pop(name, None)


def _whose(owner: Any) -> str:
    """A piece by its module, and the package that is from."""
    package = package_of(owner.__module__)
    return f"{owner.__module__}.{owner.__qualname__}" + (f" of {package}" if package != owner.__module__ else "")


def _is_looking() -> bool:
    return any(why == _LOADING for why in _TRIED.values())


def _look_around() -> None:
    """Load what installed packages offer, as far as it was not tried before in this process."""
    with _LOOKING:
        for offer in offers():
            if offer not in _TRIED:
                _TRIED[offer] = _LOADING  # it may ask for a name itself
                _TRIED[offer] = _take(offer)


def _take(offer: Offer) -> str:
    """Load what a package offers; why that can't be done, "" if it can."""
    known: dict[str, Any] = {**_COMPOSITIONS, **_PIECES}
    try:
        found: Any = load(offer)
        if isinstance(found, type) and issubclass(found, Piece):
            register(found)
        elif found is not None and found not in _COMPOSITIONS.values():
            return "it is no module and no piece"
    except NameTakenError as error:
        _withdraw(known)
        _dispute(error)
        return str(error)
    except Exception as error:  # whatever a package may raise as it is imported
        _withdraw(known)
        return reason(error)
    _FOUND.update({name: kind for name, kind in {**_COMPOSITIONS, **_PIECES}.items() if name not in known})
    return ""


def _withdraw(known: Mapping[str, Any]) -> None:
    """Forget what a package registered before its import failed; what else it imported stays."""
    for table in (_PIECES, _COMPOSITIONS):
        for name in [name for name, kind in table.items() if name not in known and kind.__module__ not in sys.modules]:
            del table[name]


def _dispute(error: NameTakenError) -> None:
    """Let nobody have a name that two packages offer. One that adapterzoo or the program has stays where it is."""
    if error.name in _FOUND:
        _PIECES.pop(error.name, None)
        _COMPOSITIONS.pop(error.name, None)
        _DISPUTED[error.name] = f"{error}, or uninstall one of the two packages"


def _broken() -> list[str]:
    return [f"{offer}: {why}" for offer, why in _TRIED.items() if why not in ("", _LOADING)]


def _unknown(name: str, known: Mapping[str, Any]) -> SpecError | PieceError:
    """What to say of a name that nobody has, or that two packages want."""
    return PieceError(_DISPUTED[name]) if name in _DISPUTED else UnknownPieceError(name, known, _broken())


def _maker(name: str) -> Callable[..., Piece]:
    """The piece or composition of that name."""
    if name not in _PIECES and name not in _COMPOSITIONS:
        _look_around()
    known: dict[str, Callable[..., Piece]] = {**_COMPOSITIONS, **_PIECES}
    if name not in known:
        raise _unknown(name, known)
    return known[name]


def _read_spec(node: ast.expr, text: str) -> Piece:
    if isinstance(node, ast.Name):
        raise SpecError(f"write {node.id}() with brackets in {_short(text)}")
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise SpecError(f"{_short(_source(node, text))} in {_short(text)} is not a piece such as LoRA(r=8)")
    name = node.func.id
    make = _maker(name)
    fields: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise SpecError(f"** has no place in a spec: {_short(text)}")
        if keyword.arg in fields:
            raise SpecError(f"{name} got {keyword.arg} twice in {_short(text)}")
        is_inside = keyword.arg == "inner" and isinstance(keyword.value, ast.Call)
        fields[keyword.arg] = _read_spec(keyword.value, text) if is_inside else _read_value(keyword.value, text)
    inside = [_read_spec(argument, text) for argument in node.args]
    try:
        return make(*inside, **fields)
    except TypeError as error:  # a named composition given what its function does not take
        raise SpecError(f"{name}: {error}") from None


def _read_value(node: ast.expr, text: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        source = _short(_source(node, text))
        raise SpecError(f"{source} in {_short(text)} is not a number, string, True, False, None or tuple") from None


def _source(node: ast.expr, text: str) -> str:
    return ast.get_source_segment(text.strip(), node) or text


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _to_tree(spec: Piece) -> dict[str, Any]:
    name = type(spec).__name__
    if name in _DISPUTED:
        raise PieceError(_DISPUTED[name])
    if _PIECES.get(name) is not type(spec):
        raise SpecError(f"{name} is not registered, so nothing could read it back: decorate the class with @register")
    fields = {name: getattr(spec, name) for name in type(spec).model_fields}
    inside = {"inner": _to_tree(fields.pop("inner"))} if "inner" in fields else {}
    return {"piece": type(spec).__name__, **inside, **fields}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise SpecError(f"the key {_short(twice)} stands twice in one object")
    return fields


def _from_tree(tree: Any) -> Piece:
    if not isinstance(tree, dict) or not isinstance(tree.get("piece"), str):
        raise SpecError(f'a piece in JSON is an object with the key "piece"; found {_short(json.dumps(tree))}')
    kind = piece(tree["piece"])
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in tree.items() if name != "piece"}
    if "inner" in fields:
        fields["inner"] = _from_tree(fields["inner"])
    return kind(**fields)
