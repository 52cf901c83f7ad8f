"""The default loop: adapt, train, look; in steps that others can put together, such as those who pack runs."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from adapterzoo.ablation.tasks.devices import Randomness, moved, synchronise
from adapterzoo.ablation.tasks.measures import Trajectories, saved_bytes, sizes, state_bytes
from adapterzoo.ablation.tasks.records import Outcome, Part, Run, Scores
from adapterzoo.errors import TrainingError
from adapterzoo.pieces import layers_of
from adapterzoo.surgery import adapt
from adapterzoo.training.attach import attach
from adapterzoo.training.groups import param_groups

if TYPE_CHECKING:
    from adapterzoo.ablation.tasks.task import Task  # it runs `train` unless it brings a loop of its own


def train(task: "Task", run: Run) -> Outcome:
    """Adapt the task's model, train it, and score it: a pure function of its arguments, but for times.

    Raises:
        TrainingError: a loss or score that is not finite, by step and cell; or fewer batches than steps.
    """
    training = Training(task, run)
    while training.left:
        training.step()
    return training.finish()


class Training:
    """One run, step by step.

    Everything that it draws comes from the run's seed, by generators of its own: several may take turns in one process.
    Where nothing trains (no spec, and no head) there are no steps, and the model is scored as it is.

    Args:
        task: what is run.
        run: what this run is told.

    Example:
        What `train` does:

            training = Training(task, run)
            while training.left:
                training.step()
            outcome = training.finish()

        A step is `descend(backward(batch()))`. Who computes gradients otherwise, those of several runs in one pass,
        calls `batch` and `descend` of each.
    """

    def __init__(self, task: "Task", run: Run) -> None:
        self.task, self.run, self.done = task, run, 0
        self._start = self._begun = perf_counter()
        self._random = Randomness(run.seed, run.device)
        _forget_peak(run.device)
        with self._random:
            self.model = adapted_model(task, run)
            self._batches: Iterator[Any] = iter(task.batches(run.shared, run.seed))
        self.sizes = sizes(self.model)
        self.steps = task.steps if sum(self.sizes) else 0
        self.optimizer = optimiser(task, run, self.model) if self.steps else None
        self._schedule = LambdaLR(self.optimizer, partial(rate_factor, task)) if self.optimizer else None
        self._looks = look_steps(self.steps, task.looks)
        self._trajectories = Trajectories(self.model)
        self._milliseconds: list[float] = []
        self._saved = self._memory = 0
        self._seen: Scores | None = None
        self.run.log(0, self._trajectories.now())

    @property
    def left(self) -> int:
        """How many steps are left."""
        return self.steps - self.done

    def step(self) -> None:
        """Take one step; look where a look is due."""
        self.descend(self.backward(self.batch()))

    def batch(self) -> Any:
        """The next batch, on the run's device.

        Raises:
            TrainingError: the task has none left.
        """
        with self._random:
            found = next(self._batches, _NONE)
        if found is _NONE:
            raise TrainingError(f"{self._name}: {self.task.name}.batches gave {self.done} batches for {self.steps}")
        batch = moved(found, self.run.device)
        self.model.train()
        synchronise(self.run.device)
        self._begun = perf_counter()
        return batch

    def backward(self, batch: Any) -> float:
        """Gradients of a batch, added to those that are there; its loss.

        Raises:
            TrainingError: a loss that is not finite; there are no gradients of it then.
        """
        with self._random:
            loss = self._forward(batch)
            value = self._finite(loss.item(), "loss", self.done + 1)
            loss.backward()  # type: ignore[no-untyped-call]
        return value

    def descend(self, loss: float, seconds: float | None = None) -> None:
        """Let the optimiser step, with the gradients as they are; look where a look is due, and tell of it.

        Args:
            loss: of this run's batch.
            seconds: what the step has taken so far; measured since `batch` if not given.

        Raises:
            TrainingError: a loss or score that is not finite.
        """
        assert self.optimizer is not None
        assert self._schedule is not None
        self._finite(loss, "loss", self.done + 1)
        if seconds is not None:
            self._begun = perf_counter() - seconds
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self._schedule.step()
        self.done += 1
        if self.done == self._counted:
            self._memory = self._saved + state_bytes(self.optimizer)
        self.optimizer.zero_grad()
        synchronise(self.run.device)
        self._milliseconds.append(1000 * (perf_counter() - self._begun))
        self._tell({"loss": loss, "lr": rate, "ms_per_step": self._milliseconds[-1]})

    def look(self, part: Part = "validation") -> Scores:
        """Score the model as it is now; it changes nothing that training reads.

        Raises:
            TrainingError: a score that is not finite.
        """
        self.model.eval()
        with torch.no_grad(), Randomness(self.run.seed, self.run.device):
            scores = self.task.scores(self.model, self.run.shared, part, self.run.seed)
        self.model.train()
        for name, value in scores.metrics.items():
            self._finite(value, f"{part}/{name}", self.done)
        if part == "validation":
            self._seen = scores
        return scores

    def finish(self) -> Outcome:
        """What the run gave; only a run that may test looks at the test part."""
        last = self._seen or self.look()
        metrics = named("validation", last.metrics)
        if self.run.test:
            last = self.look("test")
            metrics |= named("test", last.metrics)
        return Outcome({**metrics, **self._costs()}, last.examples)

    def _forward(self, batch: Any) -> Tensor:
        forward = partial(self.task.loss, self.model, batch)
        if self.done + 1 != self._counted or self.run.device.type == "cuda":
            return forward()
        loss, self._saved = saved_bytes(forward, chain(self.model.parameters(), self.model.buffers()))
        return loss

    @property
    def _counted(self) -> int:
        """The step that is counted: the second, since optimisers make their state in the first."""
        return min(2, self.steps)

    def _costs(self) -> dict[str, float]:
        costs: dict[str, float] = {"adapter_parameters": self.sizes.adapters, "head_parameters": self.sizes.others}
        if self._milliseconds:
            costs["ms_per_step"] = median(self._milliseconds[1:] or self._milliseconds)
            on_gpu = self.run.device.type == "cuda"
            costs["memory_bytes"] = torch.cuda.max_memory_allocated(self.run.device) if on_gpu else self._memory
        return {**costs, "seconds": perf_counter() - self._start}

    def _tell(self, metrics: dict[str, float]) -> None:
        """Log a step, and the look that is due after it."""
        if self.done in self._looks:
            metrics = metrics | named("validation", self.look().metrics) | self._trajectories.now()
        self.run.log(self.done, {**metrics, "seconds": perf_counter() - self._start})

    @property
    def _name(self) -> str:
        return f"{self.run.spec or 'the head alone'}, seed {self.run.seed}, lr {self.task.lr:g}"

    def _finite(self, value: float, what: str, step: int) -> float:
        if not math.isfinite(value):
            raise TrainingError(f"{self._name}: {what} is {value} at step {step} of {self.steps}; a lower lr may help")
        return value


_NONE = object()


def adapted_model(task: "Task", run: Run) -> nn.Module:
    """The model of a run before its first step: adapted, on its device, all else frozen but what the task trains."""
    model = task.model(run.shared, run.seed).to(run.device)
    targets = task.targets if isinstance(task.targets, str) else list(task.targets)
    if run.spec is not None:
        adapt(model, run.spec, targets, train=list(task.trained), seed=run.seed)
        return model
    model.requires_grad_(False)
    for name in task.trained:
        model.get_submodule(name).requires_grad_()
    return model


def optimiser(task: "Task", run: Run, model: nn.Module) -> AdamW:
    """AdamW over the parameter groups by role, attached where pieces have something to do at every step."""
    found = AdamW(param_groups(model, task.lr, weight_decay=task.weight_decay), weight_decay=task.weight_decay)
    if run.spec is not None and any(piece.step_rule() is not None for piece in layers_of(run.spec)):
        attach(model, found, total_steps=task.steps)
    return found


def rate_factor(task: "Task", step: int) -> float:
    """By what the learning rate is multiplied in a step, counted from 0: up along a line, then along the schedule.

    Example:
        >>> from adapterzoo.ablation.tasks.registry import make_task
        >>> task = make_task({"name": "digits", "steps": 10, "warmup": 0.2, "schedule": "linear"})
        >>> [round(rate_factor(task, step), 2) for step in range(10)]
        [0.5, 1.0, 1.0, 0.88, 0.75, 0.62, 0.5, 0.38, 0.25, 0.12]
    """
    warmup = round(task.warmup * task.steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, task.steps - warmup)
    shapes: dict[str, Callable[[float], float]] = {
        "cosine": lambda share: (1 + math.cos(math.pi * min(1.0, share))) / 2,
        "linear": lambda share: max(0.0, 1 - share),
        "constant": lambda share: 1.0,
    }
    return shapes[task.schedule](progress)


def look_steps(steps: int, looks: int) -> frozenset[int]:
    """After which steps to look: evenly spread, the last one among them.

    Example:
        >>> sorted(look_steps(10, 4))
        [3, 5, 8, 10]
    """
    looks = min(looks, steps)
    return frozenset(-(-steps * look // looks) for look in range(1, looks + 1))


def named(part: Part, metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a part under its name: "validation/accuracy"."""
    return {f"{part}/{name}": value for name, value in metrics.items()}


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
