"""All checks, and running them without a test framework."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from adapterzoo.errors import SpecError, did_you_mean
from adapterzoo.testing.check import CheckFunction
from adapterzoo.testing.checks.compiled import check_compile
from adapterzoo.testing.checks.contract import check_contract, check_purity, check_text
from adapterzoo.testing.checks.devices import check_devices
from adapterzoo.testing.checks.draws import check_draws
from adapterzoo.testing.checks.dropout import check_dropout
from adapterzoo.testing.checks.dtypes import check_dtypes
from adapterzoo.testing.checks.files import check_files
from adapterzoo.testing.checks.merging import check_merge
from adapterzoo.testing.checks.norms import check_norms
from adapterzoo.testing.checks.promises import check_promises
from adapterzoo.testing.checks.start import check_start
from adapterzoo.testing.checks.training import check_neutral, check_training
from adapterzoo.testing.checks.values import check_gradients, check_values
from adapterzoo.testing.failure import CheckFailedError
from adapterzoo.testing.subject import Checkable

CHECKS: tuple[CheckFunction, ...] = (
    check_contract, check_purity, check_text, check_start, check_values, check_gradients, check_promises, check_norms,
    check_merge, check_files, check_dropout, check_neutral, check_training, check_draws, check_dtypes, check_devices,
    check_compile,
)  # fmt: skip
"""Every check, in the order in which a piece is best mended."""


class Result(NamedTuple):
    """What one check found.

    Args:
        check: its name.
        passed: whether it found what was expected.
        message: what is wrong, "" if nothing is.
        expected: the reason why it was expected to fail; None if it was not.
    """

    check: str
    passed: bool
    message: str = ""
    expected: str | None = None


def checks_for(what: Checkable) -> list[CheckFunction]:
    """The checks that are for a piece."""
    return [check for check in CHECKS if check.applies(what)]


def run_checks(
    what: Checkable,
    *,
    draws: int | None = None,
    seed: int = 0,
    expected_failed_checks: Mapping[str, str] | None = None,
) -> list[Result]:
    """Run every check on a piece and say what each found; nothing is raised.

    Args:
        what: a class of pieces, a spec, or the name or text of one.
        draws: rounds of cases; those of ADAPTERZOO_DRAWS, or one, if not given.
        seed: of all that is drawn.
        expected_failed_checks: names of checks that must fail, each with the reason.

    Example:
        >>> from adapterzoo import LoRA
        >>> from adapterzoo.testing import run_checks
        >>> [result.check for result in run_checks(LoRA(r=2)) if not result.passed]
        []
    """
    expected = dict(expected_failed_checks or {})
    check_names(expected)
    return [_run(check, what, draws, seed, expected.get(check.name)) for check in checks_for(what)]


def check_names(names: Mapping[str, str]) -> None:
    """Raise a SpecError unless all are names of checks, each with a reason."""
    known = [check.name for check in CHECKS]
    for name, reason in names.items():
        if name not in known:
            raise SpecError(f"no check {name!r}; known: {', '.join(known)}{did_you_mean(name, known)}")
        if not (isinstance(reason, str) and reason.strip()):
            raise SpecError(f"{name} is expected to fail without a reason; give one: {{{name!r}: 'why'}}")


def _run(check: CheckFunction, what: Checkable, draws: int | None, seed: int, reason: str | None) -> Result:
    try:
        check(what, draws=draws, seed=seed)
    except CheckFailedError as failure:
        return Result(check.name, reason is not None, str(failure), reason)
    if reason is not None:
        return Result(check.name, False, f"{check.name} was expected to fail ({reason}), and passed", reason)
    return Result(check.name, True)


def failures(results: Sequence[Result]) -> list[Result]:
    """Those results that are not as expected."""
    return [result for result in results if not result.passed]
