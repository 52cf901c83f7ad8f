"""TensorBoard: a folder of event files for each run; `tensorboard --logdir runs/tensorboard` shows them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Tells TensorBoard.

    Args:
        folder: of all runs; each gets one of its own in it, by its name.
    """

    def __init__(self, folder: str = "runs/tensorboard") -> None:
        self._folder = folder

    def start(self, label: str, run: Mapping[str, Any]) -> None:
        """Open the run's folder."""
        self._writer = SummaryWriter(str(Path(self._folder) / run["id"]))
        self._writer.add_text("run", label)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add points."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        """Add how it ended, and close."""
        self._writer.add_text("status", status)
        for name, value in metrics.items():
            self._writer.add_scalar(f"final/{name}", value)
        self._writer.close()
