"""The task: functions of Python's standard library, and the docstrings that describe them.

Read from the sources of the Python that runs, so the pairs are those of its version; `fingerprint` says which they are.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from adapterzoo.streams import stream

Function = ast.FunctionDef | ast.AsyncFunctionDef

MASK = "masked"
"""What stands for a function's own name, in its docstring and in its code."""

FEWEST_WORDS = 4
LEFT_OUT = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages"})
TEST, VALIDATION = 500, 300


@dataclass(frozen=True)
class Pair:
    """One function: where it stands, and the two texts that belong together.

    Args:
        package: the top-level package or module, such as "email".
        place: path below the standard library, line and name.
        docstring: the first paragraph, on one line, with the function's name masked.
        code: the function without docstrings, as `ast.unparse` writes it, with its name masked.
    """

    package: str
    place: tuple[str, int, str]
    docstring: str
    code: str


@dataclass(frozen=True)
class Split:
    """Three sets of pairs; no package is in two of them."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]


@cache
def standard_library() -> tuple[Pair, ...]:
    """Every pair of the standard library, by path and line; of texts that come again, docstring or code, the first."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
    with warnings.catch_warnings():
        # An old escape in some file is no reason to leave it out, as it would be where warnings are errors.
        warnings.simplefilter("ignore")
        return tuple(unrepeated(pair for path in paths for pair in pairs_of(path.read_bytes(), path.relative_to(root))))


def pairs_of(source: bytes | str, path: Path) -> Iterator[Pair]:
    """The pairs of one file, in the order of its lines; none if it is no Python of this version.

    Example:
        >>> text = 'def halve(x):' + chr(10) + '    "Give half of x, as halve does."' + chr(10) + '    return x / 2'
        >>> [pair] = pairs_of(text, Path("numbers.py"))
        >>> pair.docstring, pair.code
        ('Give half of x, as masked does.', 'def masked(x):\\n    return x / 2')
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    package = path.parts[0].removesuffix(".py")
    functions = [node for node in _blocks(tree) if isinstance(node, Function)]
    described = [(node, ast.get_docstring(node) or "") for node in functions]
    for node in functions:
        _strip(node)
    for node, docstring in sorted(described, key=lambda item: (item[0].lineno, item[0].col_offset)):
        text = masked(first_paragraph(docstring), node.name)
        if node.body and len(text.split()) >= FEWEST_WORDS and node.name != MASK:
            place = (path.as_posix(), node.lineno, node.name)
            yield Pair(package, place, text, masked(_code(node), node.name))


def first_paragraph(docstring: str) -> str:
    """All up to the first empty line, on one line."""
    return " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split())


def masked(text: str, name: str) -> str:
    """The text with a name masked wherever it is a whole word, in capitals or not."""
    return re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", MASK, text, flags=re.IGNORECASE)


def unrepeated(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """The pairs whose docstring and whose code did not come before."""
    seen: set[str] = set()
    for pair in pairs:
        if pair.docstring not in seen and pair.code not in seen:
            yield pair
        seen |= {pair.docstring, pair.code}


def split(pairs: Sequence[Pair], tested: int = TEST, validated: int = VALIDATION) -> Split:
    """Deal whole packages out, in the order of a hash of their names: first to test, then to validation, then to train.

    Args:
        pairs: all of them.
        tested, validated: packages go to a set until it has this many pairs, and so many are drawn from it.
    """
    packages: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        packages[pair.package].append(pair)
    train: list[Pair] = []
    validation: list[Pair] = []
    test: list[Pair] = []
    for name in sorted(packages, key=lambda name: hashlib.blake2b(name.encode()).digest()):
        part = test if len(test) < tested else validation if len(validation) < validated else train
        part += packages[name]
    return Split(tuple(train), _drawn(validation, validated, "validation"), _drawn(test, tested, "test"))


def candidates(pairs: Sequence[Pair], count: int = 32) -> Tensor:
    """What each docstring has to choose from: its own function first, then others of its package, then of the rest.

    Returns:
        Indices into the pairs: [len(pairs), count]. A draw depends on the place of the pair, not on others.
    """
    if len(pairs) < count:
        raise ValueError(f"{len(pairs)} pairs can't give {count} candidates each; take count ≤ {len(pairs)}")
    rows = []
    for own, pair in enumerate(pairs):
        order = torch.randperm(len(pairs), generator=stream("candidates", *pair.place)).tolist()
        others = [other for other in order if other != own]
        others.sort(key=lambda other: pairs[other].package != pair.package)  # stable: the draw decides within each half
        rows.append([own, *others[: count - 1]])
    return torch.tensor(rows)


def fingerprint(pairs: Sequence[Pair]) -> str:
    """A short hash of all texts, in their order."""
    digest = hashlib.blake2b(digest_size=8)
    for pair in pairs:
        digest.update(f"{pair.package}\0{pair.docstring}\0{pair.code}\0".encode())
    return digest.hexdigest()


def _drawn(pairs: Sequence[Pair], count: int, key: str) -> tuple[Pair, ...]:
    chosen = torch.randperm(len(pairs), generator=stream("docstrings", key))[:count].sort().values
    return tuple(pairs[index] for index in chosen.tolist())


def _blocks(node: ast.AST) -> Iterator[ast.AST]:
    """A node and the statements in it, at any depth; unlike `ast.walk`, not what they are made of."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _blocks(child)


def _strip(node: Function) -> None:
    """Take the docstring off."""
    if ast.get_docstring(node) is not None:
        node.body = node.body[1:]


def _code(node: Function) -> str:
    """What is left, as text; nested functions and classes that were a docstring alone get a `pass`."""
    for inner in _blocks(node):
        if isinstance(inner, ast.ClassDef) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:]
        if isinstance(inner, Function | ast.ClassDef) and not inner.body:
            inner.body = [ast.Pass()]
    return ast.unparse(node)
