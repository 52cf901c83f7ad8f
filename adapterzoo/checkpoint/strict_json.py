"""JSON as a stranger may have written it: bounded, without duplicate keys, NaN or text that is no Unicode."""

import json
from collections.abc import Sequence
from typing import Any

from adapterzoo.checkpoint.wording import short
from adapterzoo.errors import CheckpointError

LARGEST = 64 * 2**20
"""The most bytes that are read: a description of 100,000 layers needs about half of it."""

_LINE = 112


def loads(data: bytes, where: str) -> Any:
    """Read JSON strictly.

    Args:
        data: the bytes of the file.
        where: the file, for messages.

    Returns:
        Dictionaries, lists, texts, numbers, booleans and None.

    Raises:
        CheckpointError: too large, no UTF-8, no JSON, nested too deeply, a key that stands twice in an object, NaN or
            infinity, a number of thousands of digits, or half a Unicode character.
    """
    if len(data) > LARGEST:
        raise CheckpointError(f"{where} has more than {LARGEST:,} bytes, which no description of adapters needs")
    try:
        tree = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
        json.dumps(tree, ensure_ascii=False).encode("utf-8")  # fails on half a character, as "\ud800" is
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON that can be read: {_why(error)}") from None
    return tree


def dumps(tree: Any) -> bytes:
    """Write JSON for people too: what is short stands on one line."""
    return (_written(tree, "") + "\n").encode("utf-8")


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "it holds text that is no Unicode" if isinstance(error, UnicodeError) else str(error)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {short(twice)} stands twice in one object")
    return fields


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _written(tree: Any, indent: str) -> str:
    deeper, line = indent + " ", json.dumps(tree, allow_nan=False)
    if len(line) <= _LINE:
        return line
    if isinstance(tree, dict):
        lines = [f"{deeper}{json.dumps(key)}: {_written(value, deeper)}" for key, value in tree.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(tree, list):
        return "[\n" + ",\n".join(deeper + _written(value, deeper) for value in tree) + f"\n{indent}]"
    return line
