"""Full precision while factors are built, whatever the process allows its products."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch

_FLAGS = [backend.matmul for backend in (torch.backends.cuda, torch.backends.mkldnn) if hasattr(backend, "matmul")]
_FLAGS = [flags for flags in _FLAGS if hasattr(flags, "fp32_precision")]
_FULL = {"highest", "ieee", "none", None}


def full_precision(device: str) -> AbstractContextManager[Any]:
    """Products in the precision of their factors: no autocast, and no TF32 or bfloat16 inside those of float32.

    The second are flags of the process, so other threads see them too. A compiled graph can't switch them: there the
    user's setting holds.
    """
    if torch.compiler.is_compiling():
        return torch.autocast(device, enabled=False)
    if torch.is_autocast_enabled(device) or _PRECISION.held or not _FULL.issuperset(_float32_precisions()):
        return _full_precision(device)
    return nullcontext()


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    with torch.autocast(device, enabled=False):
        _PRECISION.enter()
        try:
            yield
        finally:
            _PRECISION.leave()


class _Precision:
    """Full float32 while anyone is inside; the last one out of all threads gives the user's setting back."""

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._before: list[str | None] = []

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = _float32_precisions()
                if self._before[0] is not None:
                    torch.set_float32_matmul_precision("highest")
                for flags in _FLAGS:
                    flags.fp32_precision = "ieee"
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                legacy, *others = self._before
                if legacy is not None:
                    torch.set_float32_matmul_precision(legacy)
                for flags, precision in zip(_FLAGS, others, strict=True):
                    flags.fp32_precision = precision

    @property
    def held(self) -> bool:
        return self._inside > 0


_PRECISION = _Precision()


def _float32_precisions() -> list[str | None]:
    """The process-wide precision of products, then those by backend that newer versions of torch have beside it."""
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's answer where only the newer flags have been set
        legacy = None
    return [legacy, *(flags.fp32_precision for flags in _FLAGS)]
