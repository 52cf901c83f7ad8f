"""What the tests of engines have carried out: functions that do one thing, and that crash in every way there is."""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

LOADED = []
_DEADLINE = 120


def perform(payload):
    """Do what payload["do"] says, after telling who one is."""
    if "tell" in payload:
        about = {
            "process": os.getpid(), "parent": os.getppid(), "loaded": LOADED, "threads": torch.get_num_threads(),
            "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "group": os.getpgid(0), "session": os.getsid(0),
        }  # fmt: skip
        beside = Path(f"{payload['tell']}.{os.getpid()}")
        beside.write_text(json.dumps(about))
        beside.rename(payload["tell"])
    globals()[f"_{payload.get('do', 'nothing')}"](payload)


def warm(payload):
    """Load something that every fork finds."""
    LOADED.append(payload["data"])
    print(f"loading {payload['data']}", flush=True)
    if payload["data"] == "poison":
        os.kill(os.getpid(), signal.SIGKILL)
    if payload["data"] == "missing":
        raise FileNotFoundError("no such data")
    if payload["data"] == "thread":
        threading.Thread(target=threading.Event().wait, daemon=True).start()


def until(condition, what, seconds=_DEADLINE):
    """Wait for something that will be so; the deadline is for what never will."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.005)
    raise TimeoutError(what)


def alive(process):
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _nothing(payload):
    pass


def _speak(payload):
    print("to standard output")
    print("to standard error", file=sys.stderr)
    os.write(1, b"past Python\n")


def _not_for_ever():
    """What hangs ends even if its test has failed."""
    signal.alarm(3 * _DEADLINE)


def _hang(payload):
    """Until someone lets it go on, or kills it."""
    _not_for_ever()
    go = Path(payload.get("go", "/nonexistent"))
    while not go.exists():
        time.sleep(0.005)


def _hang_with_children(payload):
    child = os.fork()
    _not_for_ever()
    if child:
        Path(payload["child"]).write_text(str(child))
    signal.pause()


def _leave_a_child(payload):
    """Return, and leave a process behind that holds every open file."""
    child = os.fork()
    if not child:
        _not_for_ever()
        signal.pause()
    Path(payload["child"]).write_text(str(child))


def _kill(payload):
    print("about to be killed", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_once(payload):
    """The first time only."""
    mark = Path(payload["mark"])
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def _hang_once(payload):
    """Hang the first time; so that someone can kill it."""
    mark = Path(payload["mark"])
    if not mark.exists():
        _not_for_ever()
        mark.write_text(str(os.getpid()))
        signal.pause()


def _segfault(payload):
    ctypes.string_at(0)


def _raise(payload):
    raise ValueError("the loss is not a number")


def _sys_exit(payload):
    sys.exit(3)


def _os_exit(payload):
    os._exit(payload.get("code", 4))


def _backward(payload):
    torch.set_num_threads(2)
    weight = torch.ones(200, 200, requires_grad=True)
    (weight @ weight).sum().backward()


def _write(payload):
    """Add a line to a file, so that the times it was done can be counted."""
    with Path(payload["file"]).open("a") as file:
        file.write(f"{payload['text']}\n")
