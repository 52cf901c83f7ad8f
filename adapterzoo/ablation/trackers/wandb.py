"""Weights & Biases: one of its runs for each of ours."""

from collections.abc import Mapping
from typing import Any, Literal

import wandb


class WandB:
    """Tells W&B.

    Args:
        project: of the runs.
        mode: "online", or "offline" to keep them in `folder` until `wandb sync`.
        folder: for its files.
    """

    def __init__(
        self, project: str = "adapterzoo", mode: Literal["online", "offline"] = "online", folder: str = "runs"
    ) -> None:
        self._project, self._mode, self._folder = project, mode, folder

    def start(self, label: str, run: Mapping[str, Any]) -> None:
        """Begin a run of theirs, of our run's name and content."""
        self._run = wandb.init(
            project=self._project, mode=self._mode, dir=self._folder, id=run["id"], name=label, config=dict(run)
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a row."""
        self._run.log(dict(metrics), step=step)

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        """Add the summary, and end it; a failed run is marked so."""
        self._run.summary.update(dict(metrics))
        self._run.finish(exit_code=0 if status == "done" else 1)
