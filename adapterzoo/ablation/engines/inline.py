"""Runs in this very process, one after the other: to debug a task, and for tests. A crash of a run ends the driver."""

from collections import deque
from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from adapterzoo.ablation.engines.calling import PERFORM, call
from adapterzoo.ablation.engines.engine import Ended, Order


class InlineOptions(BaseModel):
    """What `inline` can be told.

    Args:
        perform: what carries an order out, as "module:function".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    perform: str = PERFORM


class InlineEngine:
    """Does each order in this process when it is waited for.

    Args:
        options: see `InlineOptions`.

    Example:
        >>> engine = InlineEngine(InlineOptions(perform="json:dumps"))
        >>> engine.submit(Order("one", {"a": 1}))
        >>> engine.wait(0)
        [Ended(key='one', problem=None)]
    """

    name: ClassVar[str] = "inline"
    Options: ClassVar = InlineOptions

    def __init__(self, options: InlineOptions | None = None) -> None:
        self._options = options or InlineOptions()
        self._orders: deque[Order] = deque()

    @property
    def capacity(self) -> int:
        """One."""
        return 1

    def submit(self, order: Order) -> None:
        """Take an order; nothing happens yet."""
        self._orders.append(order)

    def wait(self, timeout: float) -> Sequence[Ended]:
        """Do the next order, however long it takes."""
        if not self._orders:
            return []
        order = self._orders.popleft()
        return [Ended(order.key, call(self._options.perform, order.payload))]

    def close(self) -> None:
        """Drop what was not begun."""
        self._orders.clear()
