"""Start a Python that sees the modules that this one sees, and tell it what to do in a line of JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import IO, Any

# The first line comes before any import of this package, which may stand at a place that only sys.path knows.
_BOOT = (
    "import json, sys; told = json.loads(sys.stdin.buffer.readline()); sys.path[:] = told['path']; "
    "from pkgutil import resolve_name; resolve_name(told['main'])(told)"
)

# Arrow's allocator, which pandas loads, would keep a thread of its own, and a process with threads is not forked.
_QUIET = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}


def start(
    main: str,
    told: Mapping[str, Any],
    *,
    stdout: IO[bytes] | int,
    stderr: IO[bytes] | int,
    threads: int = 1,
    environment: Mapping[str, str] | None = None,
    handed: tuple[int, ...] = (),
) -> "subprocess.Popen[bytes]":
    """Start a process outside the terminal's group, so that Ctrl-C is the driver's affair alone.

    Args:
        main: what it calls, as "module:function".
        told: what that is called with, of JSON's types; `parent` and `path` are added.
        stdout, stderr: as `subprocess.Popen` takes them. Its standard input stays open: it ends when we do.
        threads: that libraries may start on import.
        environment: variables beside those of this process.
        handed: open files that it inherits.
    """
    counted = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _BOOT],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        env={**os.environ, **counted, **_QUIET, **(environment or {})},
        pass_fds=handed,
        start_new_session=True,
    )
    path = [entry or os.getcwd() for entry in sys.path]  # noqa: PTH109 (text, as sys.path wants it)
    line = json.dumps({**told, "main": main, "path": path, "parent": os.getpid()})
    assert process.stdin is not None
    try:
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended already; its exit code says so
    return process
