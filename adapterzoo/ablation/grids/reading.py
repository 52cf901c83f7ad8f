"""Reading a grid's YAML: by the safe loader, with errors that name the line."""

import re
from pathlib import Path
from typing import Any

import yaml

from adapterzoo.errors import GridError

_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_REPLACED = {_BOOL, _FLOAT}


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, in which a key that comes twice is an error instead of the last one winning.

    Scalars are read as YAML 1.2 reads them: `on`, `off`, `yes` and `no` are words, and 1e-4 is a number.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  (as PyYAML declares it)
        letter: [(tag, pattern) for tag, pattern in found if tag not in _REPLACED]
        for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool) and key in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"{key!r} comes twice", key_node.start_mark
                )
            if isinstance(key, str | int | float | bool):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:(?:\.\d+|\d+\.\d*)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def read_yaml(text: str, source: str = "grid") -> dict[str, Any]:
    """The mapping that a YAML text holds.

    Args:
        text: YAML.
        source: what errors call it.

    Raises:
        GridError: the text is no YAML, or holds no mapping.

    Example:
        >>> read_yaml("task: {name: digits}")
        {'task': {'name': 'digits'}}
    """
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise GridError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise GridError(f"{source} holds {_kind(content)}; a grid is a mapping with `task` and `grid`")
    return content


def read_file(path: Path) -> dict[str, Any]:
    """The mapping in a file.

    Raises:
        GridError: the file can't be read, or holds no grid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GridError(f"the grid {str(path)!r} can't be read: {error}") from None
    return read_yaml(text, f"the grid {str(path)!r}")


def _kind(content: object) -> str:
    return "nothing" if content is None else f"a {type(content).__name__}"
