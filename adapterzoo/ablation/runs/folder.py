"""The folder of a grid's runs: whose it is, who drives it, and what it was made by."""

import json
import os
import platform
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from adapterzoo.ablation.grids.outline import Outline
from adapterzoo.ablation.grids.planned import CellRecord
from adapterzoo.ablation.runs.identity import digest_of
from adapterzoo.ablation.runs.store import no_writing
from adapterzoo.errors import RunsError, listing

GRID, LOCK = "grid.json", ".lock"
FORMAT = 1
_SAME = ("task", "tune")


@contextmanager
def driving(folder: Path) -> Iterator[None]:
    """Hold the folder for one driver; the system lets go of it when the process ends, however it does.

    Raises:
        RunsError: another driver holds it, or it can't be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise RunsError(
            f"another driver is at work on {folder} ({_holder(folder)}); wait for it, stop it, or choose another folder"
        ) from None
    except OSError as error:
        raise no_writing(folder, error) from None
    try:
        with suppress(OSError):
            (folder / f"{LOCK}.holder").write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            (folder / f"{LOCK}.holder").unlink(missing_ok=True)
        lock.release()


def grid_record(outline: Outline, records: Sequence[CellRecord], about: Mapping[str, Any]) -> dict[str, Any]:
    """What grid.json holds.

    Args:
        outline: the grid.
        records: its cells.
        about: metric, maximise, percent and the names of tuned options.
    """
    return {
        "format": FORMAT,
        "grid": outline.model_dump(mode="json"),
        **about,
        "cells": [asdict(record) for record in records],
    }


def read_grid(folder: Path) -> dict[str, Any]:
    """grid.json of a folder of runs.

    Raises:
        RunsError: there is none, or it can't be read.
    """
    path = folder / GRID
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "is no folder of runs: it has no grid.json" if folder.is_dir() else "does not exist"
        raise RunsError(f"{folder} {what}; `adapterzoo ablate` makes one") from None
    except (OSError, ValueError) as error:
        raise RunsError(f"{path} can't be read: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        version = found.get("format") if isinstance(found, dict) else None
        raise RunsError(f"{path} has format {version!r}; this version of adapterzoo reads format {FORMAT}")
    return found


def records_of(grid: Mapping[str, Any]) -> list[CellRecord]:
    """The cells in a grid.json."""
    return [CellRecord(**cell) for cell in grid["cells"]]


def write_grid(folder: Path, record: Mapping[str, Any]) -> None:
    """Put a grid's record into its folder, in the place of an earlier one that may grow into it.

    Raises:
        RunsError: the folder holds runs of another task, search, data or code; what differs is listed.
    """
    if (folder / GRID).exists():
        _check_same(folder, read_grid(folder), record)
    beside = folder / f".{GRID}.{secrets.token_hex(4)}"
    try:
        beside.write_text(json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(folder / GRID)
    except OSError as error:
        raise no_writing(folder, error) from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _check_same(folder: Path, there: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    problems = [
        f"{name}: {_text(there['grid'].get(name))} there, {_text(record['grid'].get(name))} now"
        for name in _SAME
        if there["grid"].get(name) != record["grid"].get(name)
    ]
    before, now = _versions(there), _versions(record)
    for key in before.keys() & now.keys():
        for what, old, new in zip(("data", "code"), before[key], now[key], strict=True):
            if old != new:
                problems.append(f"{what}: {old} there, {new} now")
    if problems:
        raise RunsError(
            f"{folder} holds runs of another grid or version, which can't be mixed with this one's; choose another "
            f"folder:{listing(sorted(set(problems)))}"
        )


def _versions(record: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Data and code of each task in a record."""
    return {digest_of(cell["task"]): (cell["data"], cell["code"]) for cell in record["cells"]}


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _holder(folder: Path) -> str:
    with suppress(OSError):
        return (folder / f"{LOCK}.holder").read_text(encoding="utf-8")
    return "its process is not known"
