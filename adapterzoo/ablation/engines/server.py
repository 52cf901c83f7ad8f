"""The warm process: it has imported what runs need and loaded their data, and forks off a process for each."""

import gc
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pkgutil import resolve_name
from typing import Any, NoReturn

import torch

from adapterzoo.ablation.engines.calling import call, redirect, write_report, writing_to
from adapterzoo.ablation.engines.child import die_with, kill_group, settle, threads


# Note [Fork safety]
# A fork copies one thread. What another thread held at that moment, a lock of a memory allocator say, stays locked in
# the child for ever. So this process runs no thread: torch and the libraries of linear algebra get one each, no
# backward pass happens here, and should loading a task's data have left a thread behind, its runs are not forked: they
# are handed back, and get a process that begins with nothing.
class Server:
    """Forks runs off, and tells the driver how they end.

    Args:
        link: to the driver: lines of JSON in both directions.
        perform, warm: as "module:function".
    """

    def __init__(self, link: socket.socket, perform: str, warm: str) -> None:
        self._link, self._perform, self._warm = link, perform, warm
        self._warmed: str | None = None
        self._runs: dict[int, tuple[str, int]] = {}
        self._unread = b""
        self._lifeline = os.pipe()
        self._woken, self._waker = os.pipe()
        for end in (self._woken, self._waker):
            os.set_blocking(end, False)
        self._selector = selectors.DefaultSelector()

    def serve(self, driver: int) -> NoReturn:
        """Work until the driver is gone."""
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        if sys.platform == "linux":  # elsewhere the end of the link says it, when it is listened to
            die_with(driver, sys.stdin.fileno(), signal.SIGTERM)
        for function in (self._perform, self._warm):
            resolve_name(function)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        self._selector.register(self._link, selectors.EVENT_READ, self._listen)
        self._selector.register(self._woken, selectors.EVENT_READ, self._reap)
        self._tell(event="ready")
        while True:
            for key, _ in self._selector.select():
                key.data()

    def _listen(self) -> None:
        try:
            found = self._link.recv(2**16)
        except ConnectionError:
            found = b""
        if not found:
            self._end()
        *lines, self._unread = (self._unread + found).split(b"\n")
        for line in lines:
            self._begin(json.loads(line))

    def _begin(self, order: Mapping[str, Any]) -> None:
        key, payload = order["key"], order["payload"]
        if order["warm"]:
            self._warm_up(key, payload)
        running = threads()
        if running > 1:
            self._tell(event="unforkable", key=key, threads=running)
        else:
            self._fork(key, payload)

    def _warm_up(self, key: str, payload: Mapping[str, Any]) -> None:
        """Load what a run shares with others; what goes wrong will go wrong in the run again, and be kept there."""
        content = json.dumps(payload["warm"], sort_keys=True)
        if content == self._warmed:
            return
        self._tell(event="warming", key=key)
        with suppress(OSError), writing_to(payload.get("output")):
            try:
                resolve_name(self._warm)(payload["warm"])
            except Exception:
                traceback.print_exc()
        self._warmed = content
        gc.collect()
        gc.freeze()  # the pages of what is shared stay shared: no collection in a child touches them

    def _fork(self, key: str, payload: Mapping[str, Any]) -> None:
        report, end = os.pipe()
        os.set_blocking(report, False)
        try:
            server, process = os.getpid(), os.fork()
        except OSError as error:
            os.close(report)
            os.close(end)
            self._tell(event="ended", key=key, code=1, report="", problem=f"no process could be forked: {error}")
            return
        if process == 0:
            self._run(server, payload, end)
        os.close(end)
        with suppress(OSError):
            os.setpgid(process, process)
        self._runs[process] = (key, report)
        self._tell(event="started", key=key, process=process)

    def _run(self, server: int, payload: Mapping[str, Any], end: int) -> NoReturn:
        """What a child does; it never comes back."""
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            with suppress(OSError):
                os.setpgid(0, 0)
            self._close_in_child()
            die_with(server, self._lifeline[0])
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            settle()
            write_report(end, self._carried_out(payload))
        finally:
            os._exit(0)

    def _carried_out(self, payload: Mapping[str, Any]) -> str | None:
        try:
            redirect(payload.get("output"))
        except OSError as error:
            return f"its output can't be written: {error}"
        return call(self._perform, payload)

    def _close_in_child(self) -> None:
        self._selector.close()
        self._link.close()
        for number in (self._woken, self._waker, self._lifeline[1], *(report for _, report in self._runs.values())):
            os.close(number)

    def _reap(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._woken, 4096)
        for process in list(self._runs):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                kill_group(process)
                key, report = self._runs.pop(process)
                code = os.waitstatus_to_exitcode(status)
                self._tell(event="ended", key=key, code=code, report=_read(report))

    def _tell(self, **event: Any) -> None:
        try:
            self._link.sendall(json.dumps(event).encode() + b"\n")
        except ConnectionError:
            self._end()

    def _end(self) -> NoReturn:
        for process in self._runs:
            kill_group(process)
        os._exit(0)


def main(told: Mapping[str, Any]) -> None:
    """What the new process does."""
    torch.set_num_threads(1)
    Server(socket.socket(fileno=told["link"]), told["perform"], told["warm"]).serve(told["parent"])


def _read(report: int) -> str:
    try:
        return os.read(report, 2**16).decode()
    except BlockingIOError:  # a process that the run left behind holds the other end
        return ""
    finally:
        os.close(report)
