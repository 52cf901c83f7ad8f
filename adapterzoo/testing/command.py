"""`adapterzoo check`: the kit from the shell."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from adapterzoo.errors import CommandError, did_you_mean
from adapterzoo.pieces import Generator, Piece, Wrapper
from adapterzoo.testing.check import CheckFunction
from adapterzoo.testing.failure import CheckFailedError
from adapterzoo.testing.kit import CHECKS, checks_for
from adapterzoo.testing.subject import Checkable, Subject
from adapterzoo.testing.truth import has_own_truth

_EXAMPLE = (
    'examples: adapterzoo check mypackage.mymodule:MyGenerator\n          adapterzoo check "DoRA(LoRA(r=2))" --draws 20'
)


def add_check(commands: Any) -> None:
    """Add the command to those of a parser.

    Args:
        commands: what `ArgumentParser.add_subparsers` gave.
    """
    parser = commands.add_parser(
        "check",
        help="prove a piece, yours or ours, by the conformance kit",
        description="Run the checks of adapterzoo.testing on a piece: a line for each, and exit code 1 if one fails.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_check)
    parser.add_argument("piece", metavar="PIECE", help="module:Class, the name of a registered piece, or a spec")
    parser.add_argument("--name", metavar="CHECK", action="append", help="only this check; may be repeated")
    parser.add_argument("--draws", metavar="N", type=int, help="rounds of cases; ADAPTERZOO_DRAWS, or 1")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of all that is drawn (0)")


def run_check(options: argparse.Namespace) -> int:
    """Run the checks that the options ask for, print a line for each, and return 0, or 1 if one fails.

    Raises:
        CommandError: the piece can't be imported, a check is unknown, or there are no draws.
        AdapterError: the text of a spec that can't be read, a piece that can't be built.
    """
    what = _found(options.piece)
    checks = _asked(what, options.name)
    if not has_own_truth(Subject.of(what).kind):
        print(f"note  {Subject.of(what).name} has no dense() of its own: values are compared with its own made dense")
    failed = [check for check in checks if not _passes(check, what, options)]
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed")
    return 1 if failed else 0


def _passes(check: CheckFunction, what: Checkable, options: argparse.Namespace) -> bool:
    """Run one check and print its line."""
    try:
        check(what, draws=options.draws, seed=options.seed)
    except CheckFailedError as failure:
        print(f"FAIL  {check.name}\n  {failure}", flush=True)
        return False
    print(f"ok    {check.name:<16}  {check.says}", flush=True)
    return True


def _asked(what: Checkable, names: Sequence[str] | None) -> list[CheckFunction]:
    known = [check.name for check in CHECKS]
    for name in names or ():
        if name not in known:
            raise CommandError(f"no check {name!r}; known: {', '.join(known)}{did_you_mean(name, known)}")
    return [check for check in checks_for(what) if not names or check.name in names]


def _found(text: str) -> Checkable:
    """The piece that the command line names; a module is imported, from the current directory too."""
    module, colon, name = text.partition(":")
    if not colon or "(" in module:
        return text
    here = str(Path.cwd())
    if here not in sys.path:  # an installed command does not look into the current directory by itself
        sys.path.insert(0, here)
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise CommandError(f"{text!r} can't be imported from {here}: {error}") from error
    if isinstance(found, Piece) or (isinstance(found, type) and issubclass(found, (Generator, Wrapper))):
        return found
    raise CommandError(f"{text!r} is no piece; derive it from adapterzoo.pieces.Generator or Wrapper")
