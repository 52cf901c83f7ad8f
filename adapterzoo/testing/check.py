"""What a check is: a property of a case, and the cases that it is tried on."""

import functools
import os
from collections.abc import Callable, Iterator
from itertools import islice

from adapterzoo.errors import SpecError
from adapterzoo.pieces import Generator, Wrapper, layers_of
from adapterzoo.testing.case import Case
from adapterzoo.testing.drawing import alone, deep, layers_for, pairs, seeded
from adapterzoo.testing.failure import CheckFailedError, NoExampleError
from adapterzoo.testing.options import Choose
from adapterzoo.testing.subject import Checkable, Subject

DRAWS = "ADAPTERZOO_DRAWS"
"""The environment variable that says how many rounds of cases a check runs; one if it is not set."""

Plan = Callable[[Subject, Choose], Iterator[Case]]
"""The cases of one round."""


def everywhere(subject: Subject, choose: Choose) -> Iterator[Case]:
    """Alone on every kind of layer, in pairs with every registered piece, and two deep."""
    layers = layers_for(subject)
    yield from alone(subject, choose, layers)
    yield from pairs(subject, choose, layers)
    yield from deep(subject, choose, layers)


def by_itself(subject: Subject, choose: Choose) -> Iterator[Case]:
    """Alone, on every kind of layer."""
    yield from alone(subject, choose, layers_for(subject))


def once(subject: Subject, choose: Choose) -> Iterator[Case]:
    """Alone, on one layer."""
    yield from islice(alone(subject, choose, layers_for(subject)), 1)


def check(
    plan: Plan = everywhere, only: Callable[[Subject], bool] = lambda subject: True
) -> "Callable[[Callable[[Case], None]], CheckFunction]":
    """Make a check of a property of a case (a decorator).

    Args:
        plan: its cases.
        only: says of a subject whether the check is for it.
    """
    return lambda body: CheckFunction(body, plan, only)


class CheckFunction:
    """A property and its cases: call it with a class of pieces, a spec, the text of one, or a `Case` that failed.

    Args:
        body: the property: raises a CheckFailedError with a sentence about a case.
        plan: the cases.
        only: says of a subject whether the check is for it.
    """

    def __init__(self, body: Callable[[Case], None], plan: Plan, only: Callable[[Subject], bool]) -> None:
        functools.update_wrapper(self, body)
        self.name, self._body, self._plan, self._only = body.__name__, body, plan, only
        self.says = (body.__doc__ or "").strip().splitlines()[0]

    def applies(self, what: Checkable) -> bool:
        """Whether the check is for it."""
        return self._only(Subject.of(what))

    def cases(self, what: Checkable, draws: int | None = None, seed: int = 0) -> Iterator[Case]:
        """The cases that it is tried on.

        Args:
            what: a class of pieces, a spec, or the text of one.
            draws: rounds, each with other cases.
            seed: of all that is drawn.

        Raises:
            NoExampleError: none of the options that were tried fits a layer.
            SpecError: a composition that fits none, or no rounds.
        """
        subject, found = Subject.of(what), False
        for number in range(rounds(draws)):
            for case in self._plan(subject, seeded(seed, number, self.name, subject.name)):
                found = True
                yield case
        if not found and subject.spec is not None:
            raise SpecError(f"{subject.name} fits none of the small layers that {self.name} tries")
        if not found and not self.applies(what):
            raise SpecError(f"{self.name} has nothing to check on {subject.name}")
        if not found:
            raise NoExampleError(subject.name, "no options that were tried fit any small layer")

    def __call__(self, what: Checkable | Case, *, draws: int | None = None, seed: int = 0) -> None:
        """Try the property on every case, or on the one that is given.

        Raises:
            CheckFailedError: it does not hold; says where, and how to see it again.
        """
        if isinstance(what, Case):
            self._try(what, repr(what.piece))
            return
        for case in self.cases(what, draws, seed):
            self._try(case, Subject.of(what).name)

    def of(self, case: Case) -> None:
        """The property itself, for other checks: its failures carry no name of a check yet."""
        self._body(case)

    def _try(self, case: Case, who: str) -> None:
        try:
            self._body(case)
        except CheckFailedError as failure:
            raise CheckFailedError(self._sentence(who, case, str(failure))) from None
        except Exception as error:
            problem = f"{type(error).__name__}: {error}{_unlimited(case)}"
            raise CheckFailedError(self._sentence(who, case, problem)) from error

    def _sentence(self, who: str, case: Case, problem: str) -> str:
        return f"{who} fails {self.name}: {problem}\n    {self.name}({case!r})"

    def __repr__(self) -> str:
        return self.name


def _unlimited(case: Case) -> str:
    """What may be behind an error: numbers below one in options that declare no limit."""
    odd = [
        f"{name}={value} of {type(piece).__name__}"
        for piece in layers_of(case.piece)
        for name, field in type(piece).model_fields.items()
        if type(value := getattr(piece, name)) is int and value < 1 and not field.metadata
    ]
    return f" ({', '.join(odd)} was drawn: if that is no valid value, declare its limit, Field(ge=1))" if odd else ""


def rounds(draws: int | None) -> int:
    """How many rounds of cases are asked for: the number that is given, that of the environment, or one.

    Raises:
        SpecError: no whole number ≥ 1.
    """
    asked = os.environ.get(DRAWS, "1") if draws is None else str(draws)
    if not asked.isdecimal() or int(asked) < 1:
        what = "draws" if draws is not None else DRAWS
        raise SpecError(f"{what}={asked} would check nothing; give a whole number ≥ 1")
    return int(asked)


def is_wrapper(subject: Subject) -> bool:
    """Whether it wraps something."""
    return issubclass(subject.kind, Wrapper)


def generator_of(case: Case) -> Generator:
    """The generator of a case."""
    innermost = layers_of(case.piece)[-1]
    assert isinstance(innermost, Generator)
    return innermost
