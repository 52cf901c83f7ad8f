"""The command line: `adapterzoo COMMAND`. Every command stands in the room that it belongs to.

A command is a function that adds its own parser, with a `run` that takes the options and gives the text to print, or
the exit code if it has printed what there is to say.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from adapterzoo.ablation.command import add_ablate, add_report
from adapterzoo.analysis.command import add_count
from adapterzoo.catalogue.command import add_list, add_show
from adapterzoo.errors import AdapterError, CommandError, did_you_mean
from adapterzoo.testing.command import add_check

COMMANDS: tuple[Callable[[Any], None], ...] = (add_count, add_list, add_show, add_ablate, add_report, add_check)
"""What adds each command."""

_MISUSE = 2


class Parser(argparse.ArgumentParser):
    """A parser whose errors are sentences without a page of usage before them."""

    def error(self, message: str) -> NoReturn:
        """Raise a CommandError."""
        raise CommandError(f"{message} (`{self.prog} --help` says what there is)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, print what it gives, and return the exit code: the command's, 0, or 2 with a sentence on stderr.

    Args:
        arguments: what follows the program's name; the process's own if None.
    """
    try:
        options = _options(list(sys.argv[1:] if arguments is None else arguments))
        given = options.run(options)
        if isinstance(given, int):
            return given
        print(given, flush=True)
    except AdapterError as error:
        print(f"adapterzoo: {error}", file=sys.stderr)
        return _MISUSE
    except BrokenPipeError:  # the reader, `head` say, has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    """The options of a command; anything unknown is an error that names the nearest."""
    parser = Parser(prog="adapterzoo", description="Composable weight-decomposition adapters.", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for add in COMMANDS:
        add(commands)
    asked = arguments[0] if arguments else "--help"
    if not asked.startswith("-") and asked not in commands.choices:
        near = did_you_mean(asked, commands.choices)
        parser.error(f"unknown command {asked!r}; known: {', '.join(commands.choices)}{near}")
    options, unknown = parser.parse_known_args(arguments or ["--help"])
    if unknown:
        command = commands.choices[options.command]
        known = re.findall(r"--[\w-]+", command.format_help())
        command.error(f"unknown option {unknown[0]!r}{did_you_mean(unknown[0], known)}")
    return options
