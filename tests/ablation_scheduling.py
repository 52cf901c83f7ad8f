"""A grid of 10,000 runs on 100 workers that only pretend to work: what the driver itself spends.

`python -m tests.ablation_scheduling [cells] [workers]` prints it. The clock is virtual, and real time flows into it
wherever the driver has it: while it plans and takes in results, free workers are idle.
"""

import heapq
import io
import itertools
import json
import math
import resource
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

from rich.console import Console

from adapterzoo.ablation.driving.live import Display
from adapterzoo.ablation.driving.orders import Settings
from adapterzoo.ablation.driving.session import carry_out, plan
from adapterzoo.ablation.engines.engine import Ended
from adapterzoo.ablation.grids.outline import Outline
from tests import ablation_toys  # noqa: F401  (registers the task "toy")

TRIALS, SEEDS = 5, 45
MEAN_SECONDS = 60.0
LOST = 0.01  # of the runs' processes die


class Simulated:
    """An engine whose workers take drawn times on a virtual clock.

    Args:
        capacity: how many workers there are.
    """

    name = "inline"

    def __init__(self, capacity):
        self.capacity = capacity
        self.now = self.busy = 0.0
        self.most = 0
        self.driver = []  # seconds of processor time that the driver has spent, by the number of runs that had ended
        self._ended, self._running, self._order = 0, [], itertools.count()
        self._left = time.perf_counter(), time.process_time()

    def submit(self, order):
        self._enter()
        runs = order.payload["what"] == "run"
        lasts = -MEAN_SECONDS * math.log(1 - _draw(order.key, "seconds")) if runs else 0.0
        heapq.heappush(self._running, (self.now + lasts, next(self._order), order))
        self.busy += lasts
        self.most = max(self.most, len(self._running))
        self._leave()

    def wait(self, timeout):
        self._enter()
        found = []
        if self._running:
            self.now = max(self.now, self._running[0][0])
        while self._running and self._running[0][0] <= self.now:
            found.append(_carried_out(heapq.heappop(self._running)[2]))
        self._ended += len(found)
        self._leave()
        return found

    def close(self):
        self._running.clear()

    # Between two calls the driver works, and the clock goes on; within them only the pretended work counts.
    def _enter(self):
        self.now += time.perf_counter() - self._left[0]
        self.driver.append((self._ended, time.process_time() - self._left[1]))

    def _leave(self):
        self._left = time.perf_counter(), time.process_time()


def _draw(key, what):
    """Evenly from [0, 1), the same for the same words."""
    return int.from_bytes(sha256(f"{key} {what}".encode()).digest()[:6], "big") / 2**48


def _carried_out(order):
    """Write what a run leaves, without the syncing to disk that its own process would do."""
    if order.payload["what"] == "prepare":
        Path(order.payload["into"]).mkdir(parents=True)
        return Ended(order.key)
    if _draw(order.key, "lost") < LOST:
        return Ended(order.key, "killed by signal 9 (SIGKILL); out of memory?")
    folder = Path(order.payload["folder"]) / order.key
    folder.mkdir()
    metrics = {f"validation/{name}": _draw(order.key, name) for name in ("accuracy", "loss")}
    (folder / "result.json").write_text(json.dumps({"status": "done", "metrics": metrics, "seconds": MEAN_SECONDS}))
    return Ended(order.key)


def grid(cells):
    """A grid of so many cells: trials and seeds of each make 50 runs."""
    data = [f"set {number}" for number in range(cells // 4)]
    axes = {"spec": ["LoRA(r={r})"], "wrap": ["{spec}", "MAP({spec})"], "r": [1, 2], "data": data}
    return {
        "task": {"name": "toy"},
        "grid": {**axes, "seed": {"count": SEEDS}},
        "tune": {"lr": {"log": [1e-4, 1e-2]}, "trials": TRIALS},
    }


def simulate(folder, cells=200, workers=100):
    """Drive the grid, and measure."""
    start = time.perf_counter()
    planned = plan(Outline.of(grid(cells)))
    checked = time.perf_counter() - start
    engine, before = Simulated(workers), _peak_megabytes()
    with Display(slots=workers, console=Console(file=io.StringIO())) as display:
        tally = carry_out(planned, Path(folder), engine, display, Settings())
    runs = tally.done + tally.failed
    tenths = [0.0] * 10
    for ended, seconds in engine.driver:
        tenths[min(9, 10 * ended // runs)] += seconds
    return {
        "runs": runs,
        "failed": tally.failed,
        "workers": workers,
        "most at a time": engine.most,
        "seconds to check the grid": round(checked, 1),
        "driver: ms of processor time per run": round(1000 * sum(tenths) / runs, 2),
        "the same in the second tenth of the runs": round(1e4 * tenths[1] / runs, 2),
        "the same in the last tenth": round(1e4 * tenths[9] / runs, 2),
        "driver: MB beside what it began with": round(_peak_megabytes() - before, 1),
        "virtual hours": round(engine.now / 3600, 3),
        "share of workers busy": round(engine.busy / (workers * engine.now), 3),
    }


def _peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(simulate(place, *map(int, sys.argv[1:])), indent=1))
