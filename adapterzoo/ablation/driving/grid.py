"""Grid: what a program builds or reads, checks, runs and reports."""

from pathlib import Path
from typing import Any

from adapterzoo.ablation.driving.live import Display
from adapterzoo.ablation.driving.orders import Settings
from adapterzoo.ablation.driving.session import carry_out, plan
from adapterzoo.ablation.engines.making import make_engine
from adapterzoo.ablation.grids.cells import Cell, cells
from adapterzoo.ablation.grids.outline import Outline
from adapterzoo.ablation.reports.results import Results, read

RUNS = Path("runs")


class Grid(Outline):
    """What is compared, on what, and how; and what can be done with that.

    Args:
        task: the task's name and options: {"name": "digits", "steps": 100}.
        grid: axes, or a list of them; their products are run. `spec` holds templates of generators, `wrap` templates
            with {spec}, `seed` a list or {"count": 8}; every other axis is a placeholder of the templates or an option
            of the task.
        references: compositions beside the grid, which no wrapper is put around: "Full()", "None" for the head alone.
        tune: the search that every cell makes: {"lr": {"log": [1e-4, 1e-2]}, "trials": 5}.
        name: of the grid; it names its folder.

    Raises:
        pydantic.ValidationError: fields that can't be read; `Grid.read`, `from_yaml` and `of` say it as a GridError.

    Example:
        >>> grid = Grid(task={"name": "digits"}, grid={"spec": ["LoRA(r={r})"], "r": [2, 8], "seed": [1, 2]})
        >>> [cell.name for cell in grid.cells()]
        ['LoRA(r=2)', 'LoRA(r=8)']
    """

    def cells(self) -> list[Cell]:
        """Every cell, its spec and its task built.

        Raises:
            GridError: everything that is wrong, by cell.
        """
        return cells(self)

    def check(self) -> str:
        """Build every cell on the meta device, and say what the grid will cost.

        Raises:
            GridError: every cell that can't work, and why.
        """
        checked = plan(self)
        return "\n".join([checked.cost(), *checked.warnings()])

    def run(
        self,
        runs: str | Path | None = None,
        *,
        engine: str = "local",
        engine_options: dict[str, Any] | None = None,
        settings: Settings | None = None,
    ) -> Results:
        """Do all runs that are not done yet; call it again to go on after an interruption.

        Args:
            runs: the folder of the runs; "runs/<name>" if not given.
            engine: "local", "inline", "ray" or "slurm".
            engine_options: of the engine, such as {"workers": 2}.
            settings: device, threads, trackers, and whether failed runs are done again.

        Returns:
            What the folder holds; failed runs are rows with an error.

        Raises:
            GridError: a cell that can't work; nothing was run.
            RunsError: the folder is another driver's or grid's, or can't be written to; finished runs are whole.
        """
        folder = Path(runs) if runs is not None else RUNS / (self.name or "grid")
        settings = settings or Settings()
        checked = plan(self)
        made = make_engine(engine, engine_options or {})
        about = checked.about
        with Display(made.capacity, maximise=about["maximise"], percent=about["percent"]) as display:
            display.note(checked.cost())
            for warning in checked.warnings():
                display.note(warning)
            carry_out(checked, folder, made, display, settings)
        return read(folder)
