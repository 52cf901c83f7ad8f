"""Maps of inputs and Kronecker products, deeper than the kit draws: maps over maps with other gains, rotations."""

import pytest

from adapterzoo.testing import check_gradients, check_merge, check_norms, check_start, check_values

DEEP = [
    "ColumnDoRA(MAP(OFT(LoRA(r=2, alpha=3), block_size=2)))",
    "OFT(PreDiag(BoRA(LoKr(r=1))), block_size=2)",
    "OFT(MAP(ColumnDoRA(PreDiag(BoRA(LoRA(r=1))))), block_size=2)",
    "SORA(MAP(ColumnDoRA(LoKr(r=1))), rank=1)",
    "SORA(DoRA(LoKr(r=1)), rank=1)",
    "BoRA(MAP(ColumnDoRA(PiSSA(r=1))), detach_norm=False)",
    "MAP(ColumnDoRA(PreDiag(OFT(Full(), block_size=2))))",
    "DoRA(OFT(OFT(LoRA(r=2), block_size=1), block_size=2))",
    "ColumnDoRA(DoRA(SORA(LoRA(r=1, alpha=3), rank=1)), detach_norm=False)",
]


@pytest.mark.parametrize("check", [check_values, check_gradients, check_norms, check_start, check_merge], ids=repr)
@pytest.mark.parametrize("spec", DEEP)
def test_deep_compositions(spec, check):
    check(spec)
