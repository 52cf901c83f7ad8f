from adapterzoo_smooth import Contrast, Cosines

from adapterzoo.testing import parametrize_with_checks


@parametrize_with_checks([Cosines, Contrast])
def test_pieces(piece, check):
    check(piece)
