"""How a process ended, as a sentence."""

import json
import os
import signal
from pathlib import Path

_TAIL, _LINES, _LONGEST = 8192, 3, 300
_FATAL = "Fatal Python error"
_NO_NEWS = ("Current thread", "Thread 0x", "Extension modules:", "<no Python frame>")


def ending(code: int, report: bytes = b"", output: str | None = None) -> str | None:
    """Why a process ended.

    Args:
        code: its exit code; minus the signal if one killed it.
        report: what it wrote of its own will before: {"problem": text or null}; empty if it came to nothing.
        output: file of what it printed, whose last lines are quoted.

    Returns:
        None if its function returned.

    Example:
        >>> ending(-9)
        'killed by signal 9 (SIGKILL); out of memory?'
        >>> ending(0)
        'ended with exit code 0 before it was done (os._exit?)'
        >>> ending(0, b'{"problem": null}')
    """
    try:
        problem: str | None = json.loads(report)["problem"]
    except ValueError:
        return how(code) + last_words(output)
    return problem


def how(code: int) -> str:
    """An exit code in words.

    Example:
        >>> how(-11)
        'killed by signal 11 (SIGSEGV)'
    """
    if code >= 0:
        return f"ended with exit code {code} before it was done (os._exit?)"
    try:
        name = f" ({signal.Signals(-code).name})"
    except ValueError:
        name = ""
    return f"killed by signal {-code}{name}{'; out of memory?' if name == ' (SIGKILL)' else ''}"


def last_words(output: str | Path | None) -> str:
    """The last lines that a process has printed, as the tail of a sentence; nothing if there are none."""
    try:
        text = _tail(output) if output is not None else ""
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(_NO_NEWS)]
    fatal = [number for number, line in enumerate(lines) if line.startswith(_FATAL)]
    told = " | ".join(lines[fatal[-1] :][:_LINES])[:_LONGEST] if fatal else " | ".join(lines[-_LINES:])[-_LONGEST:]
    return f"; its last words: {told}" if told else ""


def _tail(output: str | Path) -> str:
    with Path(output).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        return file.read().decode(errors="replace")
