"""Runs on this machine, each in a process of its own: a fork of a warm one, or, with a GPU, one that is new."""

import json
import queue
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from adapterzoo.ablation.engines.engine import Ended, Order
from adapterzoo.ablation.engines.forking import News, Warm
from adapterzoo.ablation.engines.fresh import Fresh
from adapterzoo.ablation.engines.slots import LocalOptions, Slot

_TRIES = 3


class LocalEngine:
    """Forks runs off a warm process, or starts new ones, as many at a time as there are slots.

    Args:
        options: see `LocalOptions`.

    Example:
        >>> engine = LocalEngine(LocalOptions(workers=2, perform="json:dumps"))
        >>> engine.capacity
        2
        >>> engine.close()
    """

    name: ClassVar[str] = "local"
    Options: ClassVar = LocalOptions

    def __init__(self, options: LocalOptions | None = None) -> None:
        self._options = options or LocalOptions()
        slots = self._options.slots()
        self.capacity = len(slots)
        self._free = deque(slots)
        self._backlog: deque[Order] = deque()
        self._running: dict[str, Slot] = {}
        self._fresh: dict[str, Fresh] = {}
        self._warm: Warm | None = None
        self._cold: set[str] = set()
        self._returned: Counter[str] = Counter()
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def submit(self, order: Order) -> None:
        """Take an order; it begins when a slot is free."""
        self._backlog.append(order)
        self._begin()

    def wait(self, timeout: float) -> Sequence[Ended]:
        """Orders whose process has ended.

        Raises:
            RunsError: no process can be started to fork runs from.
        """
        found: list[Ended] = []
        deadline = time.monotonic() + timeout
        while not found or not self._events.empty():
            try:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            found += self._take(event)
        self._begin()
        return found

    def close(self) -> None:
        """Kill what is running, and forget it."""
        self._backlog.clear()
        for process in self._fresh.values():
            process.stop()
        if self._warm is not None:
            self._warm.stop()
        self._fresh.clear()
        self._running.clear()
        self._warm = None
        self._events = queue.SimpleQueue()  # what they said of their end is nobody's concern

    def _begin(self) -> None:
        while self._free and self._backlog:
            order = self._backlog.popleft()
            slot = self._running[order.key] = self._free.popleft()
            if self._forkable(order, slot):
                self._send(order)
            else:
                self._start(order, slot)

    def _forkable(self, order: Order, slot: Slot) -> bool:
        return self._options.forks() and slot.gpu is None and order.payload.get("device", "cpu") == "cpu"

    def _send(self, order: Order) -> None:
        if self._warm is None:
            self._warm = Warm(self._options.perform, self._options.warm, self._events)
        self._warm.send(order, warm="warm" in order.payload and _data(order) not in self._cold)

    def _start(self, order: Order, slot: Slot) -> None:
        self._fresh[order.key] = Fresh(order, self._options.perform, slot.environment, self._events)

    def _take(self, event: Any) -> list[Ended]:
        if isinstance(event, Ended):
            self._fresh.pop(event.key, None)
            return self._freed([event])
        source: Warm = event[0]
        news = source.take(event[1])
        if not source.alive:
            self._warm = None
            if source.fatal is not None:
                self._cold.add(_data(source.fatal))
        return self._freed(news.ended + self._redone(news))

    def _redone(self, news: News) -> list[Ended]:
        """Begin again what has not begun; give up what does not come to a beginning."""
        for order, threads in news.unforkable:
            _note(order, f"not forked: loading its data has left {threads} threads, so it starts from nothing")
            self._start(order, self._running[order.key])
        lost = []
        for order in news.again:
            self._returned[order.key] += 1
            if self._returned[order.key] < _TRIES:
                self._send(order)
            else:
                lost.append(Ended(order.key, f"{_TRIES} processes that it was to be forked from died before it began"))
        return lost

    def _freed(self, ended: list[Ended]) -> list[Ended]:
        for item in ended:
            self._free.append(self._running.pop(item.key))
            self._returned.pop(item.key, None)
        return ended


def _data(order: Order) -> str:
    """What an order's warm start loads, as text."""
    return json.dumps(order.payload.get("warm"), sort_keys=True)


def _note(order: Order, text: str) -> None:
    if "output" in order.payload:
        with Path(order.payload["output"]).open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")
