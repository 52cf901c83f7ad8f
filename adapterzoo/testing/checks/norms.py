"""Norms without the matrix, against the matrix."""

import torch

from adapterzoo.testing.case import Case
from adapterzoo.testing.check import check, everywhere
from adapterzoo.testing.comparing import differs, size


@check(everywhere)
def check_norms(case: Case) -> None:
    """The norms of what it returns are those of the matrix that it stands for, in the order that they are asked for."""
    layer = case.perturbed()
    with torch.no_grad():
        weight = layer.factored_weight()
        rows, update, update_rows = weight.row_norms(), weight.update_norm(), weight.update_row_norms()
        columns = weight.column_norms()
        dense, change = weight.dense(), weight.dense_update()
    scale = 1e-10 * (size(layer.weight) + size(change)) ** 2
    for what, found, matrix in (
        ("row_norms()", rows, dense.square().sum(dim=1)),
        ("column_norms()", columns, dense.square().sum(dim=0)),
        ("update_norm()", update, change.square().sum()[None]),
        ("update_row_norms()", update_rows, change.square().sum(dim=1)),
    ):
        differs(found.square(), matrix, f"{what} of {case.piece}, squared,", scale)
