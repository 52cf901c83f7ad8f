"""Runs as directories: each appears whole, by one rename, when its run has ended; nothing else counts."""

import errno
import json
import os
import secrets
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from adapterzoo.ablation.runs.identity import RunSpec
from adapterzoo.ablation.tasks.task import Outcome
from adapterzoo.errors import RunsError

Status = Literal["done", "failed"]
RUN, RESULT, METRICS, EXAMPLES, ENVIRONMENT = (
    "run.json", "result.json", "metrics.jsonl", "examples.npz", "environment.json",
)  # fmt: skip
PREPARED = "prepared"
"""The folder, beside the runs, of what their tasks have prepared."""
_PARTIAL, _OLD = ".partial-", ".old-"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_ID_DIGITS = 16


# Note [One rename]
# A run writes into a directory of its own, `.partial-<id>-<token>`, and gives it its name, `<id>`, when it has ended,
# well or badly. Renaming a directory is atomic, and it is refused where a directory of that name already holds files:
# of two processes that do the same run, one wins, and the other's is dropped. So there is no half-read record, nothing
# counts twice, and a kill at any moment costs no more than the runs that were going on.
@dataclass(frozen=True)
class Store:
    """A folder of runs.

    Args:
        folder: made when the first run begins.
    """

    folder: Path

    def status(self, run: str) -> Status | None:
        """How a run ended; None if it has not."""
        found = self.result(run)
        return None if found is None else found["status"]

    def result(self, run: str) -> dict[str, Any] | None:
        """What a run's result.json holds; None if there is no such run.

        Raises:
            RunsError: the directory is there and its record is not readable: something else wrote to it.
        """
        path = self.folder / run / RESULT
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            if path.parent.is_dir():
                raise RunsError(
                    f"{path.parent} has no {RESULT}; remove that directory, and its run is done anew"
                ) from None
            return None
        except (OSError, ValueError) as error:
            raise RunsError(f"{path} can't be read ({error}); remove {path.parent}, and its run is done anew") from None
        if not isinstance(found, dict) or found.get("status") not in ("done", "failed"):
            raise RunsError(f"{path} is no record of a run; remove {path.parent}, and its run is done anew")
        return found

    def ended(self) -> Iterator[str]:
        """The names of all runs that have ended, of this grid or not."""
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if _is_id(entry.name) and entry.is_dir():
                    yield entry.name

    def begin(self, spec: RunSpec) -> "Attempt":
        """Begin a run."""
        path = self.folder / f"{_PARTIAL}{spec.id}-{secrets.token_hex(4)}"
        path.mkdir(parents=True)
        _write_json(path / RUN, spec.model_dump())
        return Attempt(self, spec.id, path)

    def forget(self, run: str) -> None:
        """Take a run away, so that it can be done again."""
        beside = self.folder / f"{_OLD}{run}-{secrets.token_hex(4)}"
        with suppress(FileNotFoundError):
            (self.folder / run).rename(beside)
        shutil.rmtree(beside, ignore_errors=True)

    def sweep(self) -> int:
        """Remove what interrupted runs have left; only who drives the folder may. How many there were."""
        places = (self.folder, self.folder / PREPARED)
        left = [path for place in places for mark in (_PARTIAL, _OLD) for path in place.glob(f"{mark}*")]
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        return len(left)

    def check_writable(self) -> None:
        """See that files can be written here.

        Raises:
            RunsError: they can't: why, and what to do.
        """
        probe = self.folder / f"{_PARTIAL}probe-{secrets.token_hex(4)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(bytes(2**16))
        except OSError as error:
            raise no_writing(self.folder, error) from None
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)


@dataclass(frozen=True)
class Attempt:
    """A run that is going on: it ends with `finish` or `fail`.

    Args:
        store: where it will stand.
        run: its name.
        path: where it writes.
    """

    store: Store
    run: str
    path: Path

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics as they come: a line each."""
        line = json.dumps({"step": step, **{name: _plain(value) for name, value in metrics.items()}})
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def environment(self, record: Mapping[str, Any]) -> None:
        """Keep where the run happens."""
        _write_json(self.path / ENVIRONMENT, record)

    def finish(self, outcome: Outcome, seconds: float) -> bool:
        """Keep what the run gave; False if the same run ended elsewhere in the meantime, and that one counts."""
        if outcome.examples:
            with (self.path / EXAMPLES).open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **dict(outcome.examples))
        metrics = {name: _plain(value) for name, value in outcome.metrics.items()}
        return self._commit({"status": "done", "metrics": metrics, "seconds": round(seconds, 3)})

    def fail(self, error: BaseException | str, seconds: float) -> bool:
        """Keep why the run failed, with the traceback."""
        kind = "" if isinstance(error, str) else type(error).__name__
        trace = "" if isinstance(error, str) else "".join(traceback.format_exception(error))
        record = {"type": kind, "message": str(error), "traceback": trace}
        return self._commit({"status": "failed", "metrics": {}, "seconds": round(seconds, 3), "error": record})

    def _commit(self, result: Mapping[str, Any]) -> bool:
        _write_json(self.path / RESULT, result)
        for path in self.path.iterdir():
            _sync(path)
        _sync(self.path)
        try:
            self.path.rename(self.store.folder / self.run)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(self.path, ignore_errors=True)
            return False
        _sync(self.store.folder)
        return True


def no_writing(folder: Path, error: OSError) -> RunsError:
    """The sentence for a folder that can't be written to."""
    if error.errno in _NO_ROOM:
        return RunsError(
            f"no room is left on the disk of {folder}; finished runs are whole. Make room, and give the same command "
            "again: it goes on from there"
        )
    return RunsError(f"the folder of runs {folder} can't be written to: {error.strerror or error}; choose another one")


def _is_id(name: str) -> bool:
    return len(name) == _ID_DIGITS and all(digit in "0123456789abcdef" for digit in name)


def _plain(value: Any) -> float | int | None:
    """A number as JSON has it: what is not finite is null."""
    number = value.item() if hasattr(value, "item") else value
    return number if isinstance(number, int) or np.isfinite(number) else None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Ask that a file, or the names in a directory, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
