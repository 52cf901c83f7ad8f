"""What `adapterzoo ablate` does."""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from adapterzoo.ablation.driving.driver import Tally
from adapterzoo.ablation.driving.grid import RUNS, Grid
from adapterzoo.ablation.driving.live import Display
from adapterzoo.ablation.driving.orders import Settings
from adapterzoo.ablation.driving.session import Plan, carry_out, plan
from adapterzoo.ablation.engines.making import make_engine
from adapterzoo.ablation.recipes import recipe_path
from adapterzoo.ablation.reports.results import read
from adapterzoo.ablation.reports.tables import terminal
from adapterzoo.ablation.trackers.tracker import check_trackers
from adapterzoo.errors import CommandError, count, listing

RECIPE = "recipe:"
_STOPPED, _FAILED = 130, 1


def run(options: argparse.Namespace) -> str | int:
    """Do what the options ask for: the text to print, or an exit code.

    Raises:
        AdapterError: a grid that can't work, options that can't be read, a folder that can't be used.
    """
    settings = Settings(options.device, options.threads, tuple(options.track), options.retry_failed, options.pack)
    grid = read_grid_or_recipe(options.grid)
    checked = plan(grid)
    if options.check:
        return "\n".join([checked.cost(), *checked.warnings(), *_sizes(checked)])
    check_trackers(options.track)
    folder = options.runs or RUNS / grid.name
    engine = make_engine(options.engine, _engine_options(options))
    tally = Tally()
    try:
        about = checked.about
        with Display(engine.capacity, maximise=about["maximise"], percent=about["percent"]) as display:
            display.note("\n".join([checked.cost(), *checked.warnings()]))
            carry_out(checked, folder, engine, display, settings, tally)
    except KeyboardInterrupt:
        print(f"stopped after {count(tally.done, 'run')}; the same command goes on from there", file=sys.stderr)
        return _STOPPED
    terminal(read(folder))
    print(_closing(folder, tally), flush=True)
    return _FAILED if tally.failed or tally.unfinished else 0


def read_grid_or_recipe(text: str) -> Grid:
    """A grid from a file, or a recipe of this package by its name.

    Raises:
        GridError: no such file or recipe, or one that can't be read.
    """
    if text.startswith(RECIPE):
        return Grid.read(recipe_path(text.removeprefix(RECIPE)))
    return Grid.read(text)


def _engine_options(options: argparse.Namespace) -> dict[str, Any]:
    """`--workers` and every `--set`, whose values are read as YAML reads them."""
    found: dict[str, Any] = {} if options.workers is None else {"workers": options.workers}
    problems = []
    for entry in options.set:
        name, equals, value = entry.partition("=")
        if not (name and equals):
            problems.append(f"--set {entry!r} is not KEY=VALUE")
        elif name in found:
            problems.append(f"--set gives {name!r} twice")
        else:
            found[name] = yaml.safe_load(value)
    if problems:
        raise CommandError(f"these options can't be read:{listing(problems)}")
    return _for_this_machine(found, options) if options.engine == "local" else found


def _for_this_machine(found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """With the threads that a run uses; and, on GPUs, one run on each instead of all on the first."""
    gpus = {"gpus": "all"} if options.device.startswith("cuda") and not {"gpus", "workers"} & set(found) else {}
    return {"threads": options.threads, **gpus, **found}


def _sizes(checked: Plan) -> list[str]:
    width = max(len(record.cell) for record in checked.records)
    return [
        f"  {record.cell:{width}}  {record.size['adapters']:>12,} + {record.size['rest']:,} parameters, "
        f"{count(record.size['layers'], 'layer')}"
        for record in checked.records
    ]


def _closing(folder: Path, tally: Tally) -> str:
    found = f", {tally.found:,} found done" if tally.found else ""
    lines = [
        f"{count(tally.done, 'run')} done{found}, {tally.failed:,} failed. `adapterzoo report {folder}` writes a page"
    ]
    if tally.failed:
        lines.append("failed runs stand in the report; --retry-failed does them again")
    return "\n".join(lines + tally.unfinished)
