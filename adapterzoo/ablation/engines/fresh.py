"""A process that begins with nothing: for a GPU, whose state no fork survives, and where there is no fork."""

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterzoo.ablation.engines.calling import call, write_report
from adapterzoo.ablation.engines.child import die_with, kill_group, settle
from adapterzoo.ablation.engines.endings import ending
from adapterzoo.ablation.engines.engine import Ended, Order
from adapterzoo.ablation.engines.start import start

_POSIX = os.name == "posix"


class Fresh:
    """One order in one new process.

    Args:
        order: what it does.
        perform: how, as "module:function".
        environment: variables beside those of this process, such as CUDA_VISIBLE_DEVICES.
        events: is told how it ended.
    """

    # The thread starts the process and lives exactly as long: what asks Linux to die with its parent dies, in fact,
    # with the thread that started it.
    def __init__(
        self, order: Order, perform: str, environment: Mapping[str, str], events: "queue.SimpleQueue[Any]"
    ) -> None:
        self._order, self._perform, self._environment, self._events = order, perform, environment, events
        self._process: subprocess.Popen[bytes] | None = None
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._keeper = threading.Thread(target=self._keep, name=f"keeper of {order.key}", daemon=True)
        self._keeper.start()

    def stop(self) -> None:
        """Kill it, and return when it is gone."""
        self._cancelled.set()
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                _kill(self._process)
        self._keeper.join()

    def _keep(self) -> None:
        try:
            problem = self._carried_out()
        except OSError as error:
            problem = f"its process could not be started: {error}"
        self._events.put(Ended(self._order.key, problem))

    def _carried_out(self) -> str | None:
        output = self._order.payload.get("output")
        with Path(output or os.devnull).open("ab") as file, self._lock:
            if self._cancelled.is_set():
                return "cancelled"
            process = self._process = start(
                f"{__name__}:main",
                {"perform": self._perform, "payload": self._order.payload},
                stdout=subprocess.PIPE,
                stderr=file,
                threads=int(self._order.payload.get("threads", 1)),
                environment=self._environment,
            )
        with process:
            code = process.wait()
            _kill(process)  # what it has started may hold the pipe open
            report = process.stdout.read() if process.stdout is not None else b""
        return ending(code, report, output)


def main(told: Mapping[str, Any]) -> None:
    """What the new process does: standard output becomes the report, and what is printed goes with the errors."""
    die_with(told["parent"], sys.stdin.fileno())
    settle()
    report = os.dup(1)
    os.dup2(2, 1)
    write_report(report, call(told["perform"], told["payload"]))
    os._exit(0)  # no clean-up of libraries, which may crash, can spoil a run that is done


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if _POSIX:
        kill_group(process.pid)
    else:
        process.kill()
