"""Losses of several runs whose calls of the model are answered together."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from adapterzoo.ablation.packing.trees import UnpackableError

Call = tuple[tuple[Any, ...], dict[str, Any]]
Loss = Callable[[nn.Module, Any], Tensor]
Answer = Callable[[Sequence[Call]], Sequence[Any]]
"""Takes one call of every run, gives one output to every run."""


# Note [A loss is begun anew for every call]
# A task's loss is a function that calls the model, once or several times. To answer the calls of all runs together,
# each loss is run up to its next call, left by an exception, and begun anew when the answer is there. What a loss does
# before its last call is thus done again: it should be little, and draw nothing.
class _Asked(BaseException):
    """A loss has come to a call that has no answer yet. Not an Exception: a loss may catch those."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


class StandIn(nn.Module):
    """What a loss sees as its model: it gives the answers that are known, in their order, and asks for the next.

    Args:
        answers: outputs of the model's calls so far.
    """

    def __init__(self, answers: Sequence[Any]) -> None:
        super().__init__()
        self._left = list(answers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The next answer."""
        if self._left:
            return self._left.pop(0)
        raise _Asked((args, kwargs))

    def __getattr__(self, name: str) -> Any:
        """Only calls can be answered together: whatever else a loss wants of its model, it can't be packed."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise UnpackableError(f"its loss reads {name!r} of the model, and only calls can be shared") from None


def losses(loss: Loss, batches: Sequence[Any], answer: Answer) -> list[Tensor]:
    """The loss of every run on its own batch.

    Args:
        loss: of a model and a batch: [].
        batches: one a run.
        answer: runs the model on a call of every run.

    Raises:
        UnpackableError: the runs call the model different numbers of times, or a loss wants more of it than calls.

    Example:
        >>> import torch
        >>> double = lambda calls: [2 * args[0] for args, _ in calls]
        >>> losses(lambda model, x: model(model(x)).sum(), [torch.ones(1), torch.ones(2)], double)
        [tensor(4.), tensor(8.)]
    """
    answers: list[list[Any]] = [[] for _ in batches]
    while True:
        found = [_until_asked(loss, known, batch) for known, batch in zip(answers, batches, strict=True)]
        values = [item for item in found if isinstance(item, Tensor)]
        if len(values) == len(batches):
            return values
        if values:
            raise UnpackableError("different runs call the model different numbers of times")
        calls = [item.call for item in found if isinstance(item, _Asked)]
        for known, output in zip(answers, answer(calls), strict=True):
            known.append(output)


def _until_asked(loss: Loss, known: Sequence[Any], batch: Any) -> Tensor | _Asked:
    try:
        return loss(StandIn(known), batch)
    except _Asked as asked:
        return asked
