"""The conformance kit: checks that prove a piece, ours or anyone's.

A whole test file of a package with pieces of its own:

    from adapterzoo.testing import parametrize_with_checks
    from mypackage import MyGenerator, MyWrapper

    @parametrize_with_checks([MyGenerator, MyWrapper])
    def test_pieces(piece, check):
        check(piece)

Nothing here needs pytest or hypothesis but `parametrize_with_checks` and `adapterzoo.testing.strategies`.
"""

from adapterzoo.testing.case import Case as Case
from adapterzoo.testing.check import CheckFunction as CheckFunction
from adapterzoo.testing.checks.compiled import check_compile as check_compile
from adapterzoo.testing.checks.contract import check_contract as check_contract
from adapterzoo.testing.checks.contract import check_purity as check_purity
from adapterzoo.testing.checks.contract import check_text as check_text
from adapterzoo.testing.checks.devices import check_devices as check_devices
from adapterzoo.testing.checks.draws import check_draws as check_draws
from adapterzoo.testing.checks.dropout import check_dropout as check_dropout
from adapterzoo.testing.checks.dtypes import check_dtypes as check_dtypes
from adapterzoo.testing.checks.files import check_files as check_files
from adapterzoo.testing.checks.merging import check_merge as check_merge
from adapterzoo.testing.checks.norms import check_norms as check_norms
from adapterzoo.testing.checks.promises import check_promises as check_promises
from adapterzoo.testing.checks.start import check_start as check_start
from adapterzoo.testing.checks.training import check_neutral as check_neutral
from adapterzoo.testing.checks.training import check_training as check_training
from adapterzoo.testing.checks.values import check_gradients as check_gradients
from adapterzoo.testing.checks.values import check_values as check_values
from adapterzoo.testing.failure import CheckFailedError as CheckFailedError
from adapterzoo.testing.failure import NoExampleError as NoExampleError
from adapterzoo.testing.kit import CHECKS as CHECKS
from adapterzoo.testing.kit import Result as Result
from adapterzoo.testing.kit import checks_for as checks_for
from adapterzoo.testing.kit import run_checks as run_checks
from adapterzoo.testing.parametrize import parametrize_with_checks as parametrize_with_checks
