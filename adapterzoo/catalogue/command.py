"""`adapterzoo list` and `adapterzoo show`."""

import argparse
import json
import re
from typing import Any

from adapterzoo.base import WeightShape
from adapterzoo.catalogue.facts import matrix, shown
from adapterzoo.catalogue.listing import KINDS, catalogue
from adapterzoo.catalogue.page import page
from adapterzoo.errors import CommandError
from adapterzoo.registry import parse

_SIZES = re.compile(r"\d{1,10}([x×]\d{1,10})*")
_LARGEST = 2**33
"""Elements of a weight. None of them is made, but norms go by blocks of rows, and each block takes its moment."""


def add_list(commands: Any) -> None:
    """Add `list` to the commands of a parser.

    Args:
        commands: what `ArgumentParser.add_subparsers` gave.
    """
    parser = commands.add_parser(
        "list",
        help="every generator, wrapper and named composition, those of installed packages too",
        description="List what specs can be made of: what each is, its equation, where it starts, where it is from.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_list)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", action="store_true", help=f"the {kind}; all three kinds if none is asked for")


def run_list(options: argparse.Namespace) -> str:
    """The tables that the options ask for."""
    return catalogue([kind for kind in KINDS if getattr(options, kind)] or KINDS)


def add_show(commands: Any) -> None:
    """Add `show` to the commands of a parser.

    Args:
        commands: what `ArgumentParser.add_subparsers` gave.
    """
    parser = commands.add_parser(
        "show",
        help="equation, parameters, cost and source of a composition",
        description="Show a composition on a layer of some shape, piece by piece; nothing of that size is made.",
        epilog='example: adapterzoo show "MAP(LoRA(r=8))" --shape 4096x4096',
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_show)
    parser.add_argument("spec", metavar="SPEC", help='such as "MAP(LoRA(r=8))"')
    parser.add_argument("--shape", metavar="OUTxIN", default="4096x4096", help="of the layer's weight (4096x4096)")
    parser.add_argument("--kernel", metavar="SIZES", help="of a convolution, such as 3x3; IN are its channels then")
    parser.add_argument("--json", action="store_true", help="everything, for machines")


def run_show(options: argparse.Namespace) -> str:
    """What the options ask for.

    Raises:
        CommandError: a shape or kernel that can't be read.
        SpecError: no spec.
        MisfitError: a spec that does not fit the shape.
    """
    found = shown(parse(options.spec), _shape(options.shape, options.kernel))
    return json.dumps(found.tree(), indent=2, ensure_ascii=False) if options.json else page(found)


def _shape(shape: str, kernel: str | None) -> WeightShape:
    sizes = _sizes("--shape", shape, "OUTxIN, two whole numbers such as 4096x4096")
    if len(sizes) != 2:
        raise CommandError(f"--shape {shape!r} has {len(sizes)} sizes; give OUTxIN, such as 4096x4096")
    about = "one to three whole numbers such as 3x3"
    spatial = () if kernel is None else _sizes("--kernel", kernel, about)
    if len(spatial) > 3:
        raise CommandError(f"--kernel {kernel!r} has {len(spatial)} sizes; give {about}")
    found = matrix(*sizes, spatial)
    if not 1 <= found.out_features * found.in_features <= _LARGEST:
        raise CommandError(
            f"a weight of {found.out_features} x {found.in_features} is not between 1 x 1 and 2^33 elements"
        )
    return found


def _sizes(option: str, text: str, valid: str) -> tuple[int, ...]:
    if not _SIZES.fullmatch(text.strip()):
        raise CommandError(f"{option} {text!r} can't be read; give {valid}")
    return tuple(map(int, re.split("[x×]", text.strip())))
