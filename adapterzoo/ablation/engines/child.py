"""What the process of a run does before anything else: see to it that it dies with its parent, and alone."""

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
from pathlib import Path

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_FIRST_TO_GO = "500"


# Note [No process outlives its driver]
# A driver may be killed with SIGKILL, which it can't answer. On Linux every child asks the kernel to be killed when its
# parent ends. Elsewhere a thread of the child waits on a pipe that only the parent can write to: it reads its end when
# the parent is gone. Linux needs no such thread, and a run that forks workers of its own is better off without. A run
# is killed outright; the server gets SIGTERM, and kills its runs with all that they have started before it goes.
def die_with(parent: int, lifeline: int, with_signal: int = 9, linux: bool = sys.platform == "linux") -> None:
    """End when the parent does.

    Args:
        parent: its process.
        lifeline: the end to read of a pipe that the parent alone can write to.
        with_signal: what Linux is to send.
        linux: whether the kernel can be asked.
    """
    if linux:
        ctypes.CDLL(None, use_errno=True).prctl(_DIE_WITH_PARENT, with_signal)
        if os.getppid() != parent:  # it was faster
            os._exit(1)
    else:
        threading.Thread(target=_wait_for_the_end_of, args=(lifeline,), daemon=True).start()


def trace_crashes() -> None:
    """Let a segmentation fault print where it happened."""
    faulthandler.enable(file=2)


def settle() -> None:
    """Say where a crash happens, and be the process that a system without memory ends first, not the driver."""
    trace_crashes()
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)


def kill_group(leader: int) -> None:
    """Kill a process and what it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def threads() -> int:
    """Threads of this process; where the system doesn't count them, those that Python knows."""
    try:
        return len(list(Path("/proc/self/task").iterdir()))
    except OSError:
        return threading.active_count()


def _wait_for_the_end_of(lifeline: int) -> None:
    while os.read(lifeline, 1):
        pass
    os._exit(1)
