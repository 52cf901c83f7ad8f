"""Runs on a Ray cluster, one task each: fractions of GPUs, many machines, and a second try where a worker was lost."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from adapterzoo.ablation.engines.calling import call, folder_of, writing_to
from adapterzoo.ablation.engines.child import trace_crashes
from adapterzoo.ablation.engines.endings import last_words
from adapterzoo.ablation.engines.engine import Ended, Order
from adapterzoo.ablation.engines.ray_cluster import RayOptions, check_room, check_seen, connect, first_line, look, room
from adapterzoo.errors import GridError

_REFRESH = 10.0


class RayEngine:
    """Gives each order to Ray as a task whose worker ends with it.

    Args:
        options: see `RayOptions`.

    Raises:
        GridError: no cluster can be reached, or no machine of it has room for a run.
    """

    name: ClassVar[str] = "ray"
    Options: ClassVar = RayOptions

    def __init__(self, options: RayOptions | None = None) -> None:
        self._options = options or RayOptions()
        self._running: dict[Any, Order] = {}
        self._checked: set[Path] = set()
        self._counted = (-math.inf, 0)
        self._mine = connect(self._options)
        try:
            check_room(self._options)
        except GridError:
            self.close()
            raise
        o = self._options
        # One process for one run: what a run leaves behind in memory or on a GPU goes with it.
        self._task = ray.remote(
            num_cpus=o.num_cpus, num_gpus=o.num_gpus, max_retries=o.max_retries, max_calls=1, retry_exceptions=False
        )(_carry_out)

    @property
    def capacity(self) -> int:
        """Runs that there is room for, counted again every few seconds: machines come and go."""
        if self._options.workers is not None:
            return self._options.workers
        when, found = self._counted
        if time.monotonic() - when > _REFRESH:
            found = room(self._options)
            self._counted = (time.monotonic(), found)
        return found

    def submit(self, order: Order) -> None:
        """Give an order to Ray; before the first, see that the workers find the folder of runs.

        Raises:
            RunsError: they don't.
        """
        folder = folder_of(order.payload)
        if folder is not None and folder not in self._checked:
            check_seen(folder, look)
            self._checked.add(folder)
        self._running[self._task.remote(self._options.perform, order.payload)] = order

    def wait(self, timeout: float) -> Sequence[Ended]:
        """Orders whose task has ended."""
        if not self._running:
            return []
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=timeout, fetch_local=False)
        if ready:
            ready, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0, fetch_local=False)
        return [self._ended(self._running.pop(reference), reference) for reference in ready]

    def close(self) -> None:
        """Cancel what is running; end the cluster if this engine began it."""
        if ray.is_initialized():
            for reference in self._running:
                with suppress(RayError):
                    ray.cancel(reference, force=True)
        self._running.clear()
        if self._mine:
            ray.shutdown()
        self._mine = False

    def _ended(self, order: Order, reference: Any) -> Ended:
        try:
            return Ended(order.key, ray.get(reference))
        except RayTaskError as error:
            return Ended(order.key, f"its worker could not begin: {first_line(error.cause)}")
        except RayError as error:
            words = last_words(order.payload.get("output")) or f": {first_line(error)}"
            return Ended(order.key, f"{self._loss(error)}{words}")

    def _loss(self, error: RayError) -> str:
        times = self._options.max_retries + 1
        if isinstance(error, OutOfMemoryError):
            return f"its machine ran out of memory, {times} times of {times}"
        if isinstance(error, WorkerCrashedError):
            return f"its worker died, {times} times of {times}"
        return type(error).__name__


def _carry_out(perform: str, payload: Mapping[str, Any]) -> str | None:
    """What a worker does."""
    trace_crashes()
    with writing_to(payload.get("output")):
        return call(perform, payload)
