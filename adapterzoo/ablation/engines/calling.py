"""Carrying an order out in the process that one is in: find the function, call it, say how that went."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Final

PERFORM: Final = "adapterzoo.ablation.runs.worker:perform"
WARM: Final = "adapterzoo.ablation.runs.worker:warm"
# A report goes through a pipe that nobody reads before the process has ended: it has to fit into the pipe.
_LONGEST = 600


def call(perform: str, payload: Mapping[str, Any], leaving: Callable[[], bool] = lambda: False) -> str | None:
    """Call a function; whatever it raises is printed, and becomes a sentence.

    Args:
        perform: as "module:function".
        payload: what it is called with.
        leaving: whether this process is meant to be left at this moment; then SystemExit is for the caller, too.

    Returns:
        None if it returned.

    Raises:
        KeyboardInterrupt: that one is meant for the caller.

    Example:
        >>> call("json:dumps", {"steps": 3})
        >>> call("sys:exit", {})
        'left by sys.exit({}) before it was done'
    """
    try:
        resolve_name(perform)(payload)
    except KeyboardInterrupt:
        raise
    except SystemExit as exiting:
        if leaving():
            raise
        return f"left by sys.exit({exiting.code!r}) before it was done"
    except BaseException as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}".removesuffix(": ")[:_LONGEST]
    return None


@contextmanager
def writing_to(output: str | None) -> Iterator[None]:
    """Send what this process prints, C code's part included, to the end of a file.

    Args:
        output: the file; None changes nothing.
    """
    if output is None:
        yield
        return
    _flush()
    kept = os.dup(1), os.dup(2)
    try:
        redirect(output)
        yield
    finally:
        _flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def redirect(output: str | None) -> None:
    """The same, for good; None drops what is printed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    file = os.open(output or os.devnull, flags, 0o666)
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)


def write_report(pipe: int, problem: str | None) -> None:
    """Tell the parent that the call returned, or why it did not."""
    _flush()
    os.write(pipe, json.dumps({"problem": problem}).encode())


def folder_of(payload: Mapping[str, Any]) -> Path | None:
    """The folder of runs that an order is about; None where it names none."""
    if "folder" in payload:
        return Path(payload["folder"])
    return Path(payload["output"]).parent.parent if "output" in payload else None


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
