"""What an engine is: it carries orders out, each in a process of its own, and says how the process ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True)
class Order:
    """One thing to do: `perform(order.payload)` in a process of its own.

    Args:
        key: its name; no two orders in flight share it.
        payload: all that `adapterzoo.ablation.runs.worker.perform` needs, of JSON's types alone.
    """

    key: str
    payload: dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """How the process of an order ended. What the run gave stands in its own directory.

    Args:
        key: the order's.
        problem: None if `perform` returned; else a sentence, such as "killed by signal 9 (SIGKILL); out of memory?".
    """

    key: str
    problem: str | None = None


class Engine(Protocol):
    """Where runs happen. Its processes see the folder of the runs under the same path as the driver does."""

    name: ClassVar[str]

    @property
    def capacity(self) -> int:
        """How many orders the driver keeps submitted at a time."""

    def submit(self, order: Order) -> None:
        """Take an order; it returns at once."""

    def wait(self, timeout: float) -> Sequence[Ended]:
        """Orders that ended since the last call; an empty list after `timeout` seconds without any."""

    def close(self) -> None:
        """Cancel what is in flight and free everything; it may be called twice."""
