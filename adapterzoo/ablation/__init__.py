"""Ablations: grids of compositions on a task, and what they show. They need the extra `adapterzoo[ablation]`.

`adapterzoo ablate grid.yaml` runs one from the shell, `Grid(...).run()` from Python.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from adapterzoo.errors import did_you_mean

if TYPE_CHECKING:
    from adapterzoo.ablation.driving.grid import Grid as Grid
    from adapterzoo.ablation.driving.orders import Settings as Settings
    from adapterzoo.ablation.reports.results import Results as Results
    from adapterzoo.ablation.reports.results import read as read
    from adapterzoo.ablation.tasks.records import Outcome as Outcome
    from adapterzoo.ablation.tasks.records import Run as Run
    from adapterzoo.ablation.tasks.records import Scores as Scores
    from adapterzoo.ablation.tasks.records import columns as columns
    from adapterzoo.ablation.tasks.registry import task as task
    from adapterzoo.ablation.tasks.task import Task as Task

__all__ = ["Grid", "Outcome", "Results", "Run", "Scores", "Settings", "Task", "columns", "read", "task"]

# Imported when they are first asked for: a worker needs no reports, and a report no engine.
_LATER = {
    "Grid": "adapterzoo.ablation.driving.grid",
    "Outcome": "adapterzoo.ablation.tasks.records",
    "Results": "adapterzoo.ablation.reports.results",
    "Run": "adapterzoo.ablation.tasks.records",
    "Scores": "adapterzoo.ablation.tasks.records",
    "Settings": "adapterzoo.ablation.driving.orders",
    "Task": "adapterzoo.ablation.tasks.task",
    "columns": "adapterzoo.ablation.tasks.records",
    "read": "adapterzoo.ablation.reports.results",
    "task": "adapterzoo.ablation.tasks.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'adapterzoo.ablation' has no attribute {name!r}{did_you_mean(name, _LATER)}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
