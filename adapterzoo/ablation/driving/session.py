"""From a grid to its runs: check everything, say what it will cost, then do what is missing."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterzoo.ablation.driving.driver import Driver, Listener, Tally
from adapterzoo.ablation.driving.orders import Settings
from adapterzoo.ablation.engines.engine import Engine
from adapterzoo.ablation.grids.axes import BARE
from adapterzoo.ablation.grids.cells import Cell, cells
from adapterzoo.ablation.grids.checking import check
from adapterzoo.ablation.grids.outline import Outline
from adapterzoo.ablation.grids.planned import CellRecord, record_of
from adapterzoo.ablation.reports.statistics import too_small
from adapterzoo.ablation.runs.folder import driving, grid_record, write_grid
from adapterzoo.ablation.runs.identity import code_version, digest_of
from adapterzoo.ablation.runs.store import Store
from adapterzoo.errors import count


@dataclass(frozen=True)
class Plan:
    """A grid that was checked: every cell can work.

    Args:
        outline: the grid.
        records: its cells, as they are kept.
        about: what reports read of its task.
    """

    outline: Outline
    records: tuple[CellRecord, ...]
    about: Mapping[str, Any]

    def cost(self) -> str:
        """What it will take, in a sentence."""
        trials = sum(len(record.trials()) for record in self.records)
        reported = sum(len(record.seeds) for record in self.records)
        return (
            f"{count(len(self.records), 'cell')}: {count(trials, 'run')} to choose options, {reported:,} to report"
            f" ({trials + reported:,} in all); the time is estimated after the first"
        )

    def warnings(self) -> list[str]:
        """What the results will not be able to say, before a minute is spent."""
        return self._unlike_cells() + self._too_few_pairs()

    def _unlike_cells(self) -> list[str]:
        """Cells that adapt fewer layers, since their composition does not fit some: they compare unlike with unlike."""
        layers = {record.cell: record.size["layers"] for record in self.records if record.size["layers"]}
        most = max(layers.values(), default=0)
        fewer = [f"{cell} ({number} of {most})" for cell, number in layers.items() if number < most]
        return [f"fewer layers than the others, since some do not fit: {', '.join(fewer)}"] if fewer else []

    def _too_few_pairs(self) -> list[str]:
        wrappers = {record.wrapper for record in self.records if not record.reference}
        seeds = len(self.outline.seeds)
        if wrappers == {BARE}:
            return []
        if BARE not in wrappers:
            return ['no bare generator: add "{spec}" to `wrap`, or the effect of wrappers can\'t be told']
        pairs = {
            (record.wrapper, record.generator, record.panel)
            for record in self.records
            if record.wrapper != BARE and not record.reference
        }
        found = (
            ("wrappers, averaged over generators", too_small(len(wrappers) - 1, seeds)),
            ("single cells", too_small(len(pairs), seeds)),
        )
        return [f"{family}: {sentence}" for family, sentence in found if sentence]


def plan(outline: Outline) -> Plan:
    """Build every cell without values, and fingerprint its data.

    Raises:
        GridError: everything that can't work.
    """
    found = cells(outline)
    sizes = check(found)
    data: dict[str, str] = {}
    records = [
        record_of(cell, outline.seeds, _data(cell, data), code_version(cell.task), sizes[cell.name]) for cell in found
    ]
    task = found[0].task
    tuned = sorted({name for cell in found if cell.tune for name in cell.tune.options})
    about = {"metric": task.metric, "maximise": task.maximise, "percent": task.percent, "tuned": tuned}
    return Plan(outline, tuple(records), about)


def carry_out(
    plan: Plan, folder: Path, engine: Engine, listener: Listener, settings: Settings, tally: Tally | None = None
) -> Tally:
    """Do the runs of a plan that are missing in a folder.

    Args:
        plan: what `plan` gave.
        folder: of the runs.
        engine: it is closed at the end, whatever happens.
        listener: who is told.
        settings: how runs are done.
        tally: is counted on, so that a caller knows how far an interrupted grid came.

    Raises:
        RunsError: the folder is another driver's or another grid's, or can't be written to.
    """
    with closing(engine), driving(folder):
        store = Store(folder)
        store.check_writable()
        write_grid(folder, grid_record(plan.outline, plan.records, plan.about))
        store.sweep()
        return Driver(plan.records, store, engine, listener, settings, tally or Tally()).drive()


def _data(cell: Cell, known: dict[str, str]) -> str:
    """The fingerprint of a cell's data, made once for all cells that read the same."""
    content = dict(cell.task.model_dump(mode="json").items())
    key = digest_of({name: value for name, value in content.items() if name not in cell.task.unprepared})
    if key not in known:
        known[key] = cell.task.fingerprint()
    return known[key]
