"""`adapterzoo ablate` and `adapterzoo report`: their options. What they do is imported when they are called.

A shell that asks for `adapterzoo count` needs none of what they need, and may not have it.
"""

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from adapterzoo.ablation.recipes import recipe_names
from adapterzoo.errors import MissingPackageError

ENGINES = ("local", "ray", "slurm", "inline")
FORMATS = ("html", "csv", "parquet", "latex", "json", "png", "svg")


def add_ablate(commands: Any) -> None:
    """Add `ablate` to the commands of a parser.

    Args:
        commands: what `ArgumentParser.add_subparsers` gave.
    """
    parser = commands.add_parser(
        "ablate",
        help="run an ablation grid; give the command again to go on after an interruption",
        description="Check a grid, say what it will cost, and do the runs that are not done yet.",
        epilog=f"recipes: {', '.join(recipe_names())} (adapterzoo ablate recipe:NAME)",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_later("adapterzoo.ablation.driving.ablate"))
    parser.add_argument("grid", metavar="GRID", help="a YAML file, or recipe:NAME")
    parser.add_argument("--runs", metavar="DIR", type=Path, help="folder of the runs (runs/NAME)")
    parser.add_argument("--check", action="store_true", help="check the grid and say what it will cost; run nothing")
    parser.add_argument("--engine", metavar="NAME", default="local", help=f"{', '.join(ENGINES)} (local)")
    parser.add_argument("--workers", metavar="N", type=int, help="runs side by side on this machine")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="an option of the engine; repeated"
    )
    parser.add_argument("--device", metavar="DEVICE", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--threads", metavar="N", type=int, default=1, help="of each run (1)")
    parser.add_argument("--pack", metavar="N", type=int, default=1, help="runs that share a process, at most (1)")
    parser.add_argument("--retry-failed", action="store_true", help="do runs again that have failed")
    parser.add_argument(
        "--track", metavar="NAME", action="append", default=[], help="tensorboard, wandb or mlflow; repeated"
    )


def add_report(commands: Any) -> None:
    """Add `report` to the commands of a parser.

    Args:
        commands: what `ArgumentParser.add_subparsers` gave.
    """
    parser = commands.add_parser(
        "report",
        help="what a folder of runs shows: tables, statistics, pictures and one HTML page",
        description="Print the tables of a folder of runs, and write them, the pictures and the page to files.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_later("adapterzoo.ablation.reports.command"))
    parser.add_argument("runs", metavar="RUNS", type=Path, help="a folder that `adapterzoo ablate` made")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the files go (RUNS/report)")
    parser.add_argument(
        "--format", metavar="NAMES", default=",".join(FORMATS), help=f"with commas: {', '.join(FORMATS)} (all)"
    )


def _later(module: str) -> Callable[[argparse.Namespace], Any]:
    """The function `run` of a module, imported when it is called.

    Raises:
        MissingPackageError: the module needs a package that is not installed.
    """

    def run(options: argparse.Namespace) -> Any:
        try:
            found = import_module(module)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("adapterzoo"):
                raise
            raise MissingPackageError(
                f'this command needs the package {error.name!r}: pip install "adapterzoo[ablation]"'
            ) from error
        return found.run(options)

    return run
