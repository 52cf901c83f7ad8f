"""Failed runs, those with the same error together."""

from dataclasses import dataclass

import pandas as pd

from adapterzoo.ablation.reports.pictures.material import Material
from adapterzoo.errors import count

_MOST_NAMED = 50
_MOST_FAILURES = 100
_LONGEST = 20_000


@dataclass(frozen=True)
class Failure:
    """Runs that ended with one error.

    Args:
        error: in a line.
        runs: cell, role, seed and name of each.
        traceback: of the first.
    """

    error: str
    runs: tuple[str, ...]
    traceback: str

    @property
    def count(self) -> str:
        """How many they are."""
        return count(len(self.runs), "run")

    @property
    def shown(self) -> tuple[str, ...]:
        """The first of them."""
        return self.runs[:_MOST_NAMED]

    @property
    def more(self) -> str:
        """That there are more."""
        left = len(self.runs) - len(self.shown)
        return f"and {left:,} more" if left else ""


def failures(material: Material) -> list[Failure]:
    """Failed runs, those with the same error together, the most frequent first.

    Args:
        material: of the report.
    """
    runs = material.results.runs
    failed = runs[runs["status"] == "failed"]
    groups = [own for _, own in failed.groupby("error", sort=False)]
    return [_failure(own, material) for own in sorted(groups, key=len, reverse=True)[:_MOST_FAILURES]]


def _failure(runs: pd.DataFrame, material: Material) -> Failure:
    rows = runs.to_dict("records")
    traceback = material.results.tracebacks.get(rows[0]["run"], "")
    named = tuple(f"{row['cell']}, {row['role']}, seed {row['seed']} ({row['run']})" for row in rows)
    return Failure(rows[0]["error"], named, traceback[-_LONGEST:])
