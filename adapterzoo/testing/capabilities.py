"""What each piece has been seen to do: kinds of layers, dtypes, quantised weights, compiling, PEFT's files.

A table of results: every cell is what a check, or an export, gave when it was run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory

import torch
from torch import nn

from adapterzoo.errors import ExportError, PeftError
from adapterzoo.interop.peft_export import export_peft
from adapterzoo.interop.truncated import export_lora
from adapterzoo.layer import adapted_layers
from adapterzoo.pieces import Generator, Piece
from adapterzoo.surgery import adapt
from adapterzoo.testing.case import Case, perturb
from adapterzoo.testing.checks.compiled import check_compile
from adapterzoo.testing.checks.dtypes import check_dtypes
from adapterzoo.testing.checks.merging import check_merge
from adapterzoo.testing.checks.values import check_gradients, check_values
from adapterzoo.testing.drawing import drawn_case, seeded
from adapterzoo.testing.failure import CheckFailedError
from adapterzoo.testing.layers import LAYERS
from adapterzoo.testing.subject import Subject

YES, REFUSED, FAILS, ABSENT = "yes", "refused", "FAILS", "not installed"
"""What a cell may say of a check."""

EXACT, NEITHER = "exact", "no"
"""What a cell may say of PEFT's files: the composition itself, nothing, or else the rank of a LoRA that is as good."""

_OUT, _IN, _RESIDUAL = 24, 32, 1e-4


def capabilities(kind: type[Piece], inside: type[Generator], seed: int = 0) -> Mapping[str, str]:
    """Run a piece on everything, and say what it did.

    Args:
        kind: the class; a wrapper is put around `inside`.
        inside: a generator.
        seed: of options, shapes and values.
    """
    subject = Subject(kind)
    chain = [inside] if subject.needs_inside else []
    found = {layer: _on(subject, chain, layer, seed) for layer in LAYERS}
    linear = _case(subject, chain, "linear", seed)
    for dtype in ("float32", "bfloat16"):
        found[dtype] = REFUSED if linear is None else _tried([check_dtypes.of], replace(linear, dtype=dtype))
    found["compile"] = REFUSED if linear is None else _tried([check_compile.of], linear)
    return {**found, "PEFT's files": _exported(_usual(kind, *map(_usual, chain)))}


def table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """A table in Markdown: a row for each piece.

    Args:
        rows: what `capabilities` gave, by the piece's name.
    """
    columns = list(next(iter(rows.values())))
    lines = [["piece", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(row[column] for column in columns)] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _on(subject: Subject, chain: Sequence[type[Piece]], layer: str, seed: int) -> str:
    if LAYERS[layer].layer_type not in subject.layers:
        return REFUSED
    if not LAYERS[layer].is_there:
        return ABSENT
    case = _case(subject, chain, layer, seed)
    if case is None:
        return REFUSED
    if not LAYERS[layer].exact:
        return _tried([check_dtypes.of], replace(case, dtype="float32"))
    return _tried([check_values.of, check_gradients.of, check_merge.of], case)


def _case(subject: Subject, chain: Sequence[type[Piece]], layer: str, seed: int) -> Case | None:
    return drawn_case(seeded(seed, subject.name, layer), subject, layer, chain, len(chain))


def _tried(checks: Sequence[Callable[[Case], None]], case: Case) -> str:
    try:
        for check in checks:
            check(case)
    except CheckFailedError:
        return FAILS
    return YES


def _usual(kind: type[Piece], *inside: Piece) -> Piece:
    """The piece with its default options, but a small rank."""
    return kind(*inside, **({"r": 2} if "r" in kind.model_fields else {}))


def _exported(spec: Piece) -> str:
    """Whether PEFT's files can hold the composition itself, or else the rank of a LoRA that holds its update."""
    model = nn.Sequential(nn.Linear(_IN, _OUT))
    adapt(model, spec, ["0"])
    for layer in adapted_layers(model).values():
        perturb(layer, torch.Generator().manual_seed(0))
    with TemporaryDirectory() as directory:
        try:
            export_peft(model, directory)
            return EXACT
        except PeftError:
            pass
        try:
            report = export_lora(model, directory, max_residual=_RESIDUAL)
        except (PeftError, ExportError):
            return NEITHER
    return f"a LoRA of rank {report.layers[0].rank}"
