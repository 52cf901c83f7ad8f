"""pack: several runs of one task side by side in this process, on one frozen base."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

import torch

from adapterzoo.ablation.packing.calls import losses
from adapterzoo.ablation.packing.choice import Choice, Chooser, Way, Wish
from adapterzoo.ablation.packing.host import Host
from adapterzoo.ablation.packing.proof import check_gradients, check_loss, drawing_nothing
from adapterzoo.ablation.packing.sharing import share
from adapterzoo.ablation.tasks.devices import synchronise
from adapterzoo.ablation.tasks.loop import Training
from adapterzoo.ablation.tasks.task import Outcome, Run, Task

T = TypeVar("T")
Told = Callable[[Choice], None]
OF_THE_OPTIMISER = frozenset({"lr", "warmup", "schedule", "weight_decay"})
"""Options in which the tasks of packed runs may differ."""


def pack(
    task: Task | Sequence[Task], runs: Sequence[Run], wish: Wish = "auto", told: Told | None = None
) -> list[Outcome | Exception]:
    """Train several runs side by side, and give what each of them gave, or why it failed.

    The frozen base stands in memory once. In a step the batches of all runs go through it as one, and each adapter, head
    or other part that trains sees its own run's examples alone. Every run has its own optimiser, schedule, step rules
    (AdaLoRA's ranks), seeds, looks and log, by the default loop. A run that fails leaves the others as they are.

    A packed step proves itself when it is first taken, and again when inputs are first filled up to one length: losses
    and gradients are held to those of each run by itself. Where they disagree, or can't be packed at all, the runs are
    trained in turns.

    Args:
        task: of all runs; or one for each run, which may differ in the optimiser's options.
        runs: of any specs and seeds.
        wish: "auto" measures on the first steps whether packing is faster; "packed" and "apart" settle it.
        told: is given the choice that was made, once, before the runs are scored for the last time.

    Returns:
        One entry a run, in their order. Beside what `train` gives, metrics have `packed`, how many runs shared a step
        at the end (1 where they did not). `ms_per_step` and `seconds` are the run's share, and `memory_bytes`, counted
        apart, is left out on a GPU.
    """
    tasks = [task] * len(runs) if isinstance(task, Task) else list(task)
    problem = packable(tasks, runs)
    if problem is not None:
        if told is not None:
            told(Choice(len(runs), Way.APART.value, f"runs can't be packed: {problem}", {}))
        return [_caught(lambda task=task, run=run: task.run(run)) for task, run in zip(tasks, runs, strict=True)]
    packed = _Pack(tasks, runs, wish)
    packed.train()
    if told is not None:
        told(packed.choice)
    return packed.finish()


def packable(task: Task | Sequence[Task], runs: Sequence[Run]) -> str | None:
    """Say why runs can't be packed, as far as that can be known before they are built; None if nothing is known.

    Example:
        >>> from adapterzoo.ablation.tasks.registry import make_task
        >>> packable(make_task({"name": "digits"}), [])
        'there are 0 runs, and it takes two'
    """
    tasks = [task] if isinstance(task, Task) else list(task)
    if len(runs) < 2:
        return f"there {'is 1 run' if runs else 'are 0 runs'}, and it takes two"
    if len(tasks) not in (1, len(runs)):
        return f"there are {len(tasks)} tasks for {len(runs)} runs"
    first = tasks[0]
    if any(type(task) is not type(first) or _fixed(task) != _fixed(first) for task in tasks):
        return f"their tasks differ in more than {', '.join(sorted(OF_THE_OPTIMISER))}"
    if not first.packable:
        return f"the task {first.name!r} does not say that its model treats the examples of a batch one by one"
    if type(first).run is not Task.run:
        return f"the task {first.name!r} has a loop of its own"
    if any(run.device != runs[0].device or run.shared is not runs[0].shared for run in runs):
        return "they are on different devices or have different data"
    return None


def _fixed(task: Task) -> dict[str, Any]:
    return {name: value for name, value in task.model_dump().items() if name not in OF_THE_OPTIMISER}


@dataclass
class _Member:
    """One run of a pack, while it lives.

    Args:
        place: of the run in the order in which they were given.
        training: its steps.
        batch: of the step that is being taken.
        loss: of that batch.
        seconds: the run's share in forward and backward of that step.
    """

    place: int
    training: Training
    batch: Any = None
    loss: float = float("nan")
    seconds: float = 0.0

    def gradients(self) -> list[torch.Tensor | None]:
        """Of all that trains, as they are now."""
        assert self.training.optimizer is not None
        return [p.grad for group in self.training.optimizer.param_groups for p in group["params"]]

    def set_gradients(self, values: Sequence[torch.Tensor | None]) -> None:
        """Put them in the place of those that are there."""
        assert self.training.optimizer is not None
        own = [p for group in self.training.optimizer.param_groups for p in group["params"]]
        for parameter, value in zip(own, values, strict=True):
            parameter.grad = value

    def compute(self) -> None:
        """Loss and gradients by itself, as in `train`."""
        start = perf_counter()
        with self.training._random:
            loss = self.training._forward(self.batch)
            loss.backward()  # type: ignore[no-untyped-call]
        self.loss = loss.item()
        synchronise(self.training.run.device)
        self.seconds = perf_counter() - start

    def descend(self) -> None:
        """The optimiser's step. The clock of this run stood still while others had their turn."""
        self.training._begun = perf_counter() - self.seconds
        self.training.descend(self.loss)


@dataclass
class _Pack:
    tasks: Sequence[Task]
    runs: Sequence[Run]
    wish: Wish
    results: dict[int, Outcome | Exception] = field(default_factory=dict)
    members: list[_Member] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = self.runs[0].device
        self.chooser = Chooser(self.wish)
        self._host: tuple[Way, Host] | None = None
        self._proven: set[tuple[Way, bool]] = set()
        self._start, self._shared = perf_counter(), 1
        specs = [run.spec for run in self.runs]
        for place in sorted(range(len(specs)), key=lambda place: specs.index(specs[place])):  # equal specs side by side
            self._attempt(place, self._build)

    @property
    def choice(self) -> Choice:
        """What was chosen."""
        return self.chooser.choice(len(self.runs))

    def train(self) -> None:
        """Take all the steps."""
        while len([m for m in self.members if m.training.left]) > 1:
            self._step([m for m in self.members if m.training.left])
        self._forget_host()
        for member in list(self.members):
            while member in self.members and member.training.left:
                self._attempt(member.place, lambda _, member=member: member.training.step())

    def finish(self) -> list[Outcome | Exception]:
        """Score the runs for the last time; one entry a run."""
        for member in list(self.members):
            self._attempt(member.place, lambda place, member=member: self._keep(place, member.training.finish()))
        return [self.results[place] for place in range(len(self.runs))]

    def _build(self, place: int) -> None:
        training = Training(self.tasks[place], self.runs[place])
        if self.members:
            share(self.members[0].training.model, training.model)
        self.members.append(_Member(place, training))

    def _keep(self, place: int, outcome: Outcome) -> None:
        metrics = {**outcome.metrics, "packed": self._shared, "seconds": (perf_counter() - self._start) / len(self.runs)}
        if self.device.type == "cuda":
            metrics.pop("memory_bytes", None)  # the peak of all of them
        self.results[place] = Outcome(metrics, outcome.examples)

    def _attempt(self, place: int, action: Callable[[int], None]) -> None:
        """Do something for one run; if it fails, the run has failed, and the others go on."""
        try:
            action(place)
        except Exception as error:
            self.results[place] = error
            self.members = [member for member in self.members if member.place != place]
            self._forget_host()

    def _step(self, members: Sequence[_Member]) -> None:
        for member in members:
            self._attempt(member.place, lambda _, member=member: setattr(member, "batch", member.training.batch()))
        self._compute([member for member in members if member in self.members])
        for member in members:
            if member in self.members:
                self._attempt(member.place, lambda _, member=member: member.descend())

    def _compute(self, members: Sequence[_Member]) -> None:
        """Losses and gradients of all, in the way whose turn it is, or the next that works."""
        way = self.chooser.next() if len(members) > 1 else Way.APART
        while way is not Way.APART:
            try:
                self._compute_packed(way, members)
                self._shared = len(members)
                return
            except Exception as error:  # whatever it is: if it is a run's own fault, it comes again apart
                self.chooser.refuse(way, f"{error}" or type(error).__name__)
                self._forget_host()
                for member in members:
                    member.training.optimizer.zero_grad()
            way = self.chooser.instead()
        self._shared = 1
        self._compute_apart(members)

    def _compute_packed(self, way: Way, members: Sequence[_Member]) -> None:
        host = self._host_for(way, members)
        start = perf_counter()
        with drawing_nothing(self.device):
            found = losses(self.tasks[0].loss, [member.batch for member in members], host.answer)
            every = torch.stack(found)
            every.sum().backward()  # type: ignore[no-untyped-call]
        host.hand_out()
        synchronise(self.device)
        seconds = perf_counter() - start
        for member, value in zip(members, every.tolist(), strict=True):
            member.loss, member.seconds = value, seconds / len(members)
        if (way, host.filled) in self._proven:
            self.chooser.took(way, seconds)
            return
        for member in members:
            self._prove(member, every.dtype)
        self._proven.add((way, host.filled))

    def _prove(self, member: _Member, dtype: torch.dtype) -> None:
        loss, gradients, seconds = member.loss, member.gradients(), member.seconds
        member.set_gradients([None] * len(gradients))
        member.compute()
        check_loss(loss, member.loss, dtype)
        check_gradients(gradients, member.gradients(), dtype)
        member.set_gradients(gradients)
        member.loss, member.seconds = loss, seconds

    def _compute_apart(self, members: Sequence[_Member]) -> None:
        for member in members:
            self._attempt(member.place, lambda _, member=member: member.compute())
        self.chooser.took(Way.APART, sum(member.seconds for member in members))

    def _host_for(self, way: Way, members: Sequence[_Member]) -> Host:
        if self._host is None or self._host[0] is not way or self._host[1].runs != len(members):
            self._forget_host()
            self._host = way, Host([member.training.model for member in members], way is Way.STACKED)
        return self._host[1]

    def _forget_host(self) -> None:
        if self._host is not None:
            self._host[1].release()
            self._host = None
