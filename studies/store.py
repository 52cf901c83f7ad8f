"""Finished runs as files: one JSON each, written whole or not at all, and found again at the next start."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Store:
    """A folder of runs.

    Args:
        folder: made when the first run is kept.
    """

    folder: Path

    def find(self, key: str, identity: Mapping[str, object]) -> dict[str, Any] | None:
        """The outcome of a run; None if it was not done, or was done with other settings, texts or arms."""
        try:
            kept = json.loads((self.folder / f"{key}.json").read_text())
        except FileNotFoundError:
            return None
        outcome: dict[str, Any] = kept["outcome"]
        return outcome if kept["identity"] == as_json(identity) else None

    def keep(self, key: str, identity: Mapping[str, object], outcome: Mapping[str, Any]) -> None:
        """Write a run, in the place of an earlier one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write(self.folder / f"{key}.json", json.dumps({"identity": identity, "outcome": outcome}, ensure_ascii=False))


def write(path: Path, text: str) -> None:
    """Write a file beside its place and move it there: an interruption leaves the old one, or none."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text + "\n")
    beside.replace(path)


def as_json(value: object) -> object:
    """A value as it comes back from a file: tuples are lists."""
    return json.loads(json.dumps(value))
