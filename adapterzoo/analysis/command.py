"""`adapterzoo count`: the count from the shell."""

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from adapterzoo.analysis.architectures import ARCHITECTURES
from adapterzoo.analysis.building import DTYPES, check_published
from adapterzoo.analysis.counting import count
from adapterzoo.errors import AdapterError, CommandError, SpecError, TargetError, did_you_mean, listing
from adapterzoo.pieces import Piece
from adapterzoo.registry import parse
from adapterzoo.targets import ALL_LINEAR

T = TypeVar("T")

_EXAMPLE = (
    'example: adapterzoo count --arch llama-7b --spec "MAP(LoRA(r=16))" --targets q_proj,k_proj,v_proj\n\n'
    + textwrap.fill(f"known to --arch: {', '.join(ARCHITECTURES)}", width=100, break_on_hyphens=False)
)


def add_count(commands: Any) -> None:
    """Add the command to those of a parser.

    Args:
        commands: what `ArgumentParser.add_subparsers` gave.
    """
    parser = commands.add_parser(
        "count",
        help="parameters, share and bytes of an adapted model, without weights",
        description="Count the parameters of an adapted model: it is built and adapted without values.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_count)
    parser.add_argument("--arch", metavar="NAME", help="a published model, such as llama-7b")
    parser.add_argument("--config", metavar="FILE", type=Path, help="a config.json of Transformers")
    parser.add_argument("--spec", metavar="SPEC", help='what adapts the layers, such as "MAP(LoRA(r=16))"')
    parser.add_argument("--targets", metavar="NAMES", help="names of layers or their tails, with commas; all-linear")
    parser.add_argument(
        "--target",
        metavar="NAME=SPEC",
        action="append",
        help="a spec for some layers, or None to leave them alone; repeated, the first that matches wins",
    )
    parser.add_argument("--exclude", metavar="NAMES", help="layers to leave alone")
    parser.add_argument("--train", metavar="NAMES", help="modules or parameters that train as they are")
    parser.add_argument("--dtype", metavar="DTYPE", help=f"of the base: {', '.join(DTYPES)}")
    parser.add_argument("--adapter-dtype", metavar="DTYPE", help="of the adapters' factors: bfloat16 or float32")
    parser.add_argument("--per-layer", action="store_true", help="every layer instead of groups of like ones")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="everything, for machines")
    form.add_argument("--csv", action="store_true", help="the layers, for machines")


def run_count(options: argparse.Namespace) -> str:
    """Count what the options ask for, and give what is to be printed.

    Raises:
        CommandError: options that can't be read, all of them at once.
        AdapterError: what `count` refuses.
    """
    read = _Reader()
    model = read(_model, options)
    spec, targets = read(_spec_and_targets, options) or (None, ALL_LINEAR)
    dtype, adapter_dtype = read(_dtype, options.dtype), read(_dtype, options.adapter_dtype)
    read.check()
    assert model is not None
    found = count(
        model,
        spec,
        targets,
        exclude=_names(options.exclude),
        train=_names(options.train),
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        per_layer=options.per_layer,
    )
    return found.to_json() if options.json else found.to_csv() if options.csv else str(found)


class _Reader:
    """Reads options one after the other, and keeps what is wrong with them until all are read."""

    def __init__(self) -> None:
        self._problems: list[str] = []

    def __call__(self, read: Callable[[Any], T], value: Any) -> T | None:
        try:
            return read(value)
        except AdapterError as error:
            self._problems.append(str(error))
            return None

    def check(self) -> None:
        if len(self._problems) == 1:
            raise CommandError(self._problems[0])
        if self._problems:
            raise CommandError(f"these options can't be read:{listing(self._problems)}")


def _model(options: argparse.Namespace) -> str | Path:
    if (options.arch is None) == (options.config is None):
        raise CommandError("give a model, either by --arch NAME or by --config FILE")
    if options.config is not None:
        return Path(options.config)
    check_published(options.arch)
    return str(options.arch)


def _spec_and_targets(options: argparse.Namespace) -> tuple[Piece | None, Any]:
    if options.target:
        if options.spec or options.targets:
            raise SpecError("--target gives each its own spec; leave out --spec and --targets, or put them into it")
        return None, _mapping(options.target)
    if not options.spec:
        raise SpecError('give a spec, such as --spec "LoRA(r=8)", or --target NAME=SPEC for some layers')
    return parse(options.spec), ALL_LINEAR if options.targets is None else _names(options.targets)


def _mapping(entries: list[str]) -> dict[str, Piece | None]:
    """Targets and their specs, as `adapt` takes them."""
    targets: dict[str, Piece | None] = {}
    for entry in entries:
        name, equals, spec = (part.strip() for part in entry.partition("="))
        if not (name and equals and spec):
            raise TargetError(f"--target {entry!r} is not NAME=SPEC, such as 'q_proj=LoRA(r=8)' or 'lm_head=None'")
        if name in targets:
            raise TargetError(f"--target names {name!r} twice")
        targets[name] = None if spec == "None" else parse(spec)
    return targets


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise CommandError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}{did_you_mean(name, DTYPES)}")
    return DTYPES[name]
