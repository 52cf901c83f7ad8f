"""Every registered piece keeps the contract: a new one needs no line here."""

import pytest

from adapterzoo.registry import pieces
from adapterzoo.testing import parametrize_with_checks

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.utils._pytree.*", "ignore::DeprecationWarning")


@parametrize_with_checks(pieces().values())
def test_pieces(piece, check):
    check(piece)
