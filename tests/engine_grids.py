"""One small grid for every engine, and what comes of it."""

from adapterzoo.ablation.driving.orders import Settings
from adapterzoo.ablation.driving.session import carry_out, plan
from adapterzoo.ablation.grids.outline import Outline
from adapterzoo.ablation.runs.store import EXAMPLES, METRICS, Store
from tests import ablation_toys  # noqa: F401  (registers the task "toy")

GRID = {
    "task": {"name": "toy", "fails": "FLoRA"},
    "grid": {"spec": ["LoRA(r=2)", "FLoRA(r=2)"], "wrap": ["{spec}"], "seed": [3]},
}


class Deaf:
    """A listener that nothing reaches."""

    def __getattr__(self, name):
        return lambda *_: None


def carried_out(folder, engine):
    """Every run of the grid: its status, metrics, error, curve and predictions."""
    tally = carry_out(plan(Outline.of(GRID)), folder, engine, Deaf(), Settings())
    assert (tally.done, tally.failed) == (1, 1)
    store = Store(folder)
    return {run: _content(store, run) for run in store.ended()}


def _content(store, run):
    result = store.result(run)
    error = {key: value for key, value in result.get("error", {}).items() if key != "traceback"}
    files = [store.folder / run / name for name in (METRICS, EXAMPLES)]
    return result["status"], result["metrics"], error, [path.read_bytes() if path.exists() else b"" for path in files]
