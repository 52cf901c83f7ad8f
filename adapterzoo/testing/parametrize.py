"""The checks as tests of pytest."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from adapterzoo.testing.failure import CheckFailedError
from adapterzoo.testing.kit import check_names, checks_for
from adapterzoo.testing.subject import Checkable, Subject

Expected = Mapping[str, str] | Callable[[Checkable], Mapping[str, str]]


def parametrize_with_checks(pieces: Iterable[Checkable], *, expected_failed_checks: Expected | None = None) -> Any:
    """Parametrise a test with every check of every piece (a decorator for pytest).

    Args:
        pieces: classes of pieces, specs, or names or texts of them.
        expected_failed_checks: names of checks that must fail, each with the reason; or a function of a piece that
            gives them. A check that is expected to fail and passes is a failure.

    Example:
        @parametrize_with_checks([MyGenerator, "DoRA(MyGenerator(r=2))"])
        def test_pieces(piece, check):
            check(piece)
    """
    import pytest

    parameters = []
    for piece in pieces:
        expected = expected_failed_checks(piece) if callable(expected_failed_checks) else expected_failed_checks or {}
        check_names(expected)
        for check in checks_for(piece):
            reason = expected.get(check.name)
            marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True, raises=CheckFailedError)]
            parameters.append(pytest.param(piece, check, id=f"{Subject.of(piece).name}-{check.name}", marks=marks))
    return pytest.mark.parametrize(("piece", "check"), parameters)
