from adapterzoo.testing import parametrize_with_checks
from adapterzoo_smooth import Cosines, SoftCap


@parametrize_with_checks([Cosines, SoftCap])
def test_pieces(piece, check):
    check(piece)
