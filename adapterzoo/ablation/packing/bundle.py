"""Several runs, step by step side by side: each keeps its own loop, and only losses and gradients are shared work."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter

import torch

from adapterzoo.ablation.packing.calls import losses
from adapterzoo.ablation.packing.choice import Choice, Chooser, Way, Wish
from adapterzoo.ablation.packing.host import Host
from adapterzoo.ablation.packing.member import Member
from adapterzoo.ablation.packing.proof import changing_nothing, drawing_nothing
from adapterzoo.ablation.packing.sharing import share
from adapterzoo.ablation.tasks.devices import synchronise
from adapterzoo.ablation.tasks.loop import Training
from adapterzoo.ablation.tasks.task import Outcome, Run, Task


class Bundle:
    """Runs that may be packed, from their building to their scores.

    Args:
        tasks: one a run, equal but for the optimiser's options.
        runs: on one device, with the same data.
        wish: see `pack`.
    """

    def __init__(self, tasks: Sequence[Task], runs: Sequence[Run], wish: Wish) -> None:
        self._tasks, self._runs, self._device = tasks, runs, runs[0].device
        self._results: dict[int, Outcome | Exception] = {}
        self._members: list[Member] = []
        self._chooser = Chooser(wish)
        self._host: tuple[Way, Host] | None = None
        self._proven: set[tuple[Way, bool]] = set()
        self._start, self._side_by_side = perf_counter(), 1
        specs = [run.spec for run in runs]
        for place in sorted(range(len(runs)), key=lambda place: specs.index(specs[place])):  # equal ones side by side
            self._build(place)

    @property
    def choice(self) -> Choice:
        """What was chosen."""
        return self._chooser.choice(len(self._runs))

    def train(self) -> None:
        """Take all the steps."""
        while len(self._going()) > 1:
            self._each(self._going(), Member.draw)
            self._compute(self._going())
            self._each(self._going(), Member.descend)
        self._forget_host()
        while self._going():  # the last one has no company
            self._each(self._going(), Member.step)

    def finish(self) -> list[Outcome | Exception]:
        """Score the runs for the last time; one entry a run."""
        self._each(self._members, self._keep)
        return [self._results[place] for place in range(len(self._runs))]

    def _build(self, place: int) -> None:
        try:
            training = Training(self._tasks[place], self._runs[place])
            if self._members:
                share(self._members[0].training.model, training.model)
            self._members.append(Member(place, training))
        except Exception as error:
            self._results[place] = error

    def _going(self) -> list[Member]:
        return [member for member in self._members if member.training.left]

    def _each(self, members: Sequence[Member], action: Callable[[Member], None]) -> None:
        """Do something for every run; where it fails, that run has failed, and the others go on."""
        for member in list(members):
            try:
                action(member)
            except Exception as error:
                self._results[member.place] = error
                self._members.remove(member)

    def _keep(self, member: Member) -> None:
        outcome = member.training.finish()
        share = (perf_counter() - self._start) / len(self._runs)
        metrics = {**outcome.metrics, "packed": self._side_by_side, "seconds": share}
        if self._device.type == "cuda":
            metrics.pop("memory_bytes", None)  # the peak of all of them
        self._results[member.place] = Outcome(metrics, outcome.examples)

    def _compute(self, members: Sequence[Member]) -> None:
        """Losses and gradients of all, in the way whose turn it is, or the next one that works."""
        way = self._chooser.next() if len(members) > 1 else Way.APART  # others may just have failed
        while way is not Way.APART:
            try:
                self._compute_packed(way, members)
                self._side_by_side = len(members)
                return
            except Exception as error:
                self._chooser.refuse(way, str(error) or type(error).__name__)
                self._forget_host()
                self._each(members, Member.forget)
            way = self._chooser.instead()
        self._side_by_side = 1
        self._each(members, Member.compute)
        if len(self._going()) < len(members):  # then it was this run's fault, and no reason against packing the others
            self._chooser.allow_again()
        self._chooser.took(Way.APART, sum(member.seconds for member in members))

    def _compute_packed(self, way: Way, members: Sequence[Member]) -> None:
        host = self._host_for(way, members)
        start = perf_counter()
        with drawing_nothing(self._device), self._watched(way, members):
            found = torch.stack(losses(self._tasks[0].loss, [member.batch for member in members], host.answer))
            found.sum().backward()  # type: ignore[no-untyped-call]
        host.hand_out()
        synchronise(self._device)
        seconds = perf_counter() - start
        for member, loss in zip(members, found.tolist(), strict=True):
            member.loss, member.seconds = loss, seconds / len(members)
        if (way, host.filled) in self._proven:
            self._chooser.took(way, seconds)
        else:
            for member in members:
                member.prove()
            self._proven.add((way, host.filled))

    def _watched(self, way: Way, members: Sequence[Member]) -> AbstractContextManager[None]:
        if any(proven is way for proven, _ in self._proven):
            return nullcontext()
        return changing_nothing([member.training.model for member in members])

    def _host_for(self, way: Way, members: Sequence[Member]) -> Host:
        if self._host is None or self._host[0] is not way or self._host[1].runs != len(members):
            self._forget_host()
            self._host = way, Host([member.training.model for member in members], way is Way.STACKED)
        return self._host[1]

    def _forget_host(self) -> None:
        if self._host is not None:
            self._host[1].release()
            self._host = None
