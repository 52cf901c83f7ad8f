"""The warm process as the driver sees it: orders go to it, and news of them comes back."""

import json
import queue
import socket
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from adapterzoo.ablation.engines.child import kill_group
from adapterzoo.ablation.engines.endings import ending, how, last_words
from adapterzoo.ablation.engines.engine import Ended, Order
from adapterzoo.ablation.engines.start import start
from adapterzoo.errors import RunsError

_PATIENCE = 10.0


@dataclass
class News:
    """What came of a message.

    Args:
        ended: orders that have ended.
        again: orders that were not begun, and are to be given to another server.
        unforkable: the same, to be given to a process that begins with nothing, and the threads that forbid a fork.
    """

    ended: list[Ended] = field(default_factory=list)
    again: list[Order] = field(default_factory=list)
    unforkable: list[tuple[Order, int]] = field(default_factory=list)


class Warm:
    """A server process.

    Args:
        perform, warm: as "module:function".
        events: every message is put there as (this, message), to be given to `take`.
    """

    def __init__(self, perform: str, warm: str, events: "queue.SimpleQueue[Any]") -> None:
        self._functions = {"perform": perform, "warm": warm}
        self._events = events
        self._waiting: dict[str, Order] = {}
        self._begun: dict[str, tuple[Order, int]] = {}
        self._warming: str | None = None
        self._ready = False
        self.alive = True
        self.fatal: Order | None = None
        """The order whose data it was loading when it died."""
        self._link, there = socket.socketpair()
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper = threading.Thread(target=self._keep, args=(there,), name="keeper of the server", daemon=True)
        self._keeper.start()

    def send(self, order: Order, warm: bool) -> None:
        """Hand an order over.

        Args:
            order: what to do.
            warm: whether its data are loaded before the fork.
        """
        self._waiting[order.key] = order
        line = json.dumps({"key": order.key, "payload": order.payload, "warm": warm})
        with suppress(OSError):  # it is dead, and the message that says so is under way
            self._link.sendall(line.encode() + b"\n")

    def take(self, message: Mapping[str, Any]) -> News:
        """Take in what it said.

        Raises:
            RunsError: it could not even start.
        """
        event, key = message["event"], message.get("key", "")
        if event == "ready":
            self._ready = True
        elif event == "warming":
            self._warming = key
        elif event == "started":
            self._warming = None
            self._begun[key] = (self._waiting.pop(key), message["process"])
        elif event == "unforkable":
            self._warming = None
            return News(unforkable=[(self._waiting.pop(key), message["threads"])])
        elif event == "ended":
            return News(ended=[self._ended(key, message)])
        else:
            return self._gone(message)
        return News()

    def stop(self) -> None:
        """End it and all its runs, and return when it is gone."""
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._keeper.join(_PATIENCE)
        if self._keeper.is_alive() and self._process is not None:  # it is loading data, and does not listen
            for process in (self._process.pid, *(process for _, process in self._begun.values())):
                kill_group(process)
            self._keeper.join()

    def _ended(self, key: str, message: Mapping[str, Any]) -> Ended:
        order = self._begun.pop(key)[0] if key in self._begun else self._waiting.pop(key)
        output = order.payload.get("output")
        problem = message.get("problem") or ending(message["code"], message["report"].encode(), output)
        return Ended(key, problem)

    def _gone(self, message: Mapping[str, Any]) -> News:
        self.alive = False
        if not self._ready:
            raise RunsError(
                f"the process that runs are to be forked from could not start: {message['problem']}; "
                "with the engine's option fresh=true there is no such process"
            )
        for _, process in self._begun.values():
            kill_group(process)
        self.fatal = self._waiting.get(self._warming or "")
        problem = f"the process that it was forked from is gone: {message['problem']}"
        return News(ended=[Ended(key, problem) for key in self._begun], again=list(self._waiting.values()))

    def _keep(self, there: socket.socket) -> None:
        with tempfile.NamedTemporaryFile() as log, self._link:
            try:
                problem = self._followed(there, log)
            except OSError as error:
                problem = str(error)
            finally:
                there.close()
            self._events.put((self, {"event": "gone", "problem": problem}))

    def _followed(self, there: socket.socket, log: "tempfile._TemporaryFileWrapper[bytes]") -> str:
        """Start it, pass on what it says, and say how it ended."""
        told = {**self._functions, "link": there.fileno()}
        main = "adapterzoo.ablation.engines.server:main"
        process = self._process = start(main, told, stdout=log.file, stderr=log.file, handed=(there.fileno(),))
        there.close()
        with process, suppress(ConnectionError), self._link.makefile("rb") as lines:
            for line in lines:
                self._events.put((self, json.loads(line)))
        return how(process.wait()) + last_words(log.name)
