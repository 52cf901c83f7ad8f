"""The kit itself: every check can fail, on a piece that is broken for it, and sound pieces pass; the shell and pytest."""

import kit_mutants
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit_mutants import MUTANTS, Sound, SoundGain
from pydantic import Field

from adapterzoo import contract, registry, testing
from adapterzoo.base import WeightShape
from adapterzoo.cli import main
from adapterzoo.errors import SpecError, UnknownPieceError
from adapterzoo.pieces import Generator, Piece, Role, misfit
from adapterzoo.registry import pieces
from adapterzoo.testing import CHECKS, Case, CheckFailedError, NoExampleError, checks_for, run_checks, strategies
from adapterzoo.testing.options import candidates

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch):
    monkeypatch.setattr(registry, "_PIECES", pieces())
    monkeypatch.setattr(contract, "_TRIED", set(contract._TRIED))


def known(kind):
    registry._PIECES[kind.__name__] = kind
    return kind


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_piece_is_found_by_its_check(name):
    kind, check, says = MUTANTS[name]
    known(kind)
    with pytest.raises(CheckFailedError) as failure:
        getattr(testing, check)(kind)
    sentence, _, line = str(failure.value).rpartition("\n")
    assert sentence.startswith(f"{name} fails {check}: ")
    assert says in sentence
    kit_mutants._SEEN.clear()
    with pytest.raises(CheckFailedError):  # the last line shows it again
        eval(line, vars(testing))


def test_every_check_finds_a_broken_piece():
    assert {check for _, check, _ in MUTANTS.values()} == {check.name for check in CHECKS}


@pytest.mark.parametrize("kind", [Sound, SoundGain])
def test_what_is_sound_passes_every_check(kind):
    results = run_checks(known(kind))
    assert [result for result in results if not result.passed] == []
    assert [result.check for result in results] == [check.name for check in checks_for(kind)]
