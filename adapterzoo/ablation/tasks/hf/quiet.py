"""Transformers and datasets without bars, reports and threads; and their errors as sentences."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from transformers.utils import logging

_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, whose monitor is a thread, and no reports; weights are read without threads.

    Processes are forked off the one that reads them.
    """
    verbosity, bars, threads = logging.get_verbosity(), logging.is_progress_bar_enabled(), os.environ.get(_THREADS)
    data_bars = datasets.are_progress_bars_disabled()
    os.environ[_THREADS] = "1"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if not data_bars:
            datasets.enable_progress_bars()
        if threads is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = threads


def first_line(error: BaseException) -> str:
    """What an error says, on one line, and no more than that."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"
