"""Any composition as a plain LoRA in PEFT's format, for servers that take nothing else: what it costs is said."""

import os

import torch
from torch import Tensor, nn

from adapterzoo.errors import AdapterError, ExportError
from adapterzoo.interop.lowrank import Update
from adapterzoo.interop.peft_export import PeftLayer, write_adapter
from adapterzoo.interop.peft_fit import several_names, wrong_on_kind
from adapterzoo.interop.residuals import Truncated, TruncationReport
from adapterzoo.interop.staged import refuse_problems, whole_layers
from adapterzoo.layer import AdaptedLinear
from adapterzoo.methods import LoRA
from adapterzoo.precision import full_precision
from adapterzoo.sharded import inside

_FINEST = 1e-6  # what factors in float32 can promise


def export_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    rank: int | None = None,
    max_residual: float | None = 0.01,
    task_type: str | None = None,
    base_model: str | None = None,
) -> TruncationReport:
    """Write W' − W of every adapted layer as a plain LoRA in PEFT's format: the best one of its rank.

        W' ≈ W + B A,  B A = Σ_{i ≤ rank} σ_i u_i v_iᵀ,  residual = ‖W' − W − B A‖_F / ‖W' − W‖_F

    The singular value decomposition is exact, in float64, on the thin factors of the update where it has any (LoRA,
    AdaLoRA, FLoRA, SORA over them), else on the dense update, one layer at a time (DoRA, MAP, PreDiag, Full). The
    factors are written in float32, with alpha = r, so that every server's scale is 1.

    A wrapper that rescales rows of W makes an update of full rank, which a small LoRA can't hold. That is refused, with
    the rank that it would take, unless `max_residual` allows it. `merge_and_save` has no residual.

    Args:
        model: a model with adapted layers; it is left as it is.
        directory: it is made if it is not there.
        rank: of every layer's LoRA (at most min(out, in)); None takes the smallest one for each layer that keeps to
            max_residual.
        max_residual: the largest residual of a layer that is accepted, 1e-6 or more; None accepts any, with a rank.
        task_type: see export_peft.
        base_model: see export_peft.

    Returns:
        Each layer's rank and residual, of the factors as they were written.

    Raises:
        TargetError: no adapted layer.
        ExportError: a residual above the bound; layers whose update is not finite, that were merged with
            keep_base=False, or whose LoRA would be another function in PEFT. All are listed, and no file was changed.
        PeftError: something else that trains, and that PEFT has no place for. No file was changed.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from adapterzoo import AdaLoRA, adapt, export_lora
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8))
        >>> _ = adapt(model, AdaLoRA(r=4))
        >>> with torch.no_grad():
        ...     _ = model[0].adapter.lam.copy_(torch.tensor([3.0, 2.0, 0.0, 0.0]))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     report = export_lora(model, directory)
        >>> report.layers[0].rank, report.worst < 1e-6
        (2, True)
    """
    model = inside(model)
    _check_options(rank, max_residual)
    layers = whole_layers(model)
    found = [f"{name}: {why}" for name, layer in layers.items() if (why := wrong_on_kind(layer, LoRA()))]
    refuse_problems(
        found + several_names(model), "PEFT can't serve these, merge_and_save can write them, and no file was changed"
    )
    rows: list[Truncated] = []
    loras: dict[str, PeftLayer] = {}
    problems: list[str] = []
    for name, layer in layers.items():
        try:
            row, loras[name] = _truncated(layer, name, rank, max_residual)
            rows.append(row)
        except AdapterError as error:
            problems.append(str(error))
    refuse_problems(problems, "the update can't be read, and no file was changed")
    _refuse_residuals(rows, max_residual)
    write_adapter(model, directory, loras, task_type=task_type, base_model=base_model)
    return TruncationReport(tuple(rows))


def _check_options(rank: int | None, max_residual: float | None) -> None:
    if rank is None and max_residual is None:
        raise ExportError("give a rank, or a max_residual that decides on the rank of each layer")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ExportError(f"rank={rank!r} is not valid: it should be a whole number above 0, or None")
    if max_residual is not None and not (isinstance(max_residual, int | float) and max_residual >= _FINEST):
        raise ExportError(
            f"max_residual={max_residual!r} is not valid: it should be {_FINEST} or more, since the factors are "
            "written in float32; or None"
        )


@torch.no_grad()
def _truncated(layer: AdaptedLinear, name: str, rank: int | None, bound: float | None) -> tuple[Truncated, PeftLayer]:
    with full_precision(layer.weight.device.type):
        update = Update(layer.factored_weight())
    if not update.is_finite():
        raise ExportError(f"layer {name!r} has an update that is not finite")
    triplets, size, shape = update.triplets(), update.norm(), update.shape
    needed = None if bound is None else triplets.rank_for(bound)
    chosen = needed if rank is None else min(rank, *shape)
    assert chosen is not None
    B, A = triplets.factors(chosen)
    residual = update.distance(B, A) / size if size else 0.0
    return Truncated(name, shape, chosen, residual, needed, size), _as_lora(layer, B, A)


def _refuse_residuals(rows: list[Truncated], bound: float | None) -> None:
    if bound is None:
        return
    refuse_problems(
        [
            f"{row.name}: a rank of {row.rank} leaves {row.residual:.2%} of the update; "
            f"{bound:.2%} takes a rank of {row.needed} (of {min(row.shape)})"
            for row in rows
            if row.residual > bound
        ],
        f"a LoRA that small leaves more than max_residual={bound:g} of an update. Give a higher rank (rank=None takes "
        "the smallest for each layer) or a higher max_residual (None accepts any); merge_and_save(model, directory) "
        "leaves nothing. No file was changed",
    )


def _as_lora(layer: AdaptedLinear, B: Tensor, A: Tensor) -> PeftLayer:
    """Factors with the scale 1."""
    return PeftLayer(layer, LoRA(r=len(A), alpha=float(len(A))), {"A": A, "B": B})
