"""Tasks for tests of grids: quick, and able to fail in every way that a run can."""

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

from adapterzoo.ablation.tasks.registry import task
from adapterzoo.ablation.tasks.task import Outcome, Scores, Task, columns
from adapterzoo.streams import stream


@task
class Toy(Task):
    """Numbers that depend on spec, seed and options alone; no training.

    Args:
        fails, dies, ends: runs whose spec holds this text raise, are killed, or leave by os._exit.
        slow: seconds that a run takes.
        once: a file: the first run that finds none makes it and dies.
    """

    name = "toy"
    trained = ("2",)
    unprepared = Task.unprepared | {"fails", "dies", "ends", "slow", "once"}

    fails: str = "-"
    dies: str = "-"
    ends: str = "-"
    slow: float = 0.0
    once: str = ""
    width: int = 6
    data: str = "toy data"

    def fingerprint(self):
        return self.data

    def prepare(self, folder):
        (folder / "width").write_text(str(self.width))

    def load(self, folder):
        return int((Path(folder) / "width").read_text())

    def model(self, shared, seed):
        assert shared in (None, self.width)
        return nn.Sequential(nn.Linear(self.width, 5), nn.ReLU(), nn.Linear(5, 3))

    def batches(self, shared, seed):
        return []

    def loss(self, model, batch):
        return torch.zeros(())

    def scores(self, model, shared, part, seed):
        return Scores({})

    def run(self, run):
        text = repr(run.spec)
        run.log(1, {"loss": 1.0})
        time.sleep(self.slow)
        if self.once and not Path(self.once).exists():
            Path(self.once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fails in text:
            raise ValueError(f"{text} was asked to fail")
        if self.dies in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.ends in text:
            os._exit(3)
        drawn = torch.rand(20, generator=stream("toy", text, run.seed)) + torch.rand(20, generator=stream(run.seed))
        quality = float(drawn.mean()) / 2 - abs(torch.tensor(self.lr).log10().item() + 3) / 10
        run.log(2, {"loss": 0.5, "validation/accuracy": quality})
        metrics = {"validation/accuracy": quality, "validation/loss": 1 - quality, "adapter_parameters": 4}
        if run.test:
            metrics["test/accuracy"] = quality + 0.01
        return Outcome(metrics, columns(id=torch.arange(20), score=drawn))
