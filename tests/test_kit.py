"""The kit itself: every check fails on a piece that is broken for it, and sound pieces pass; pytest and the shell."""

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
from adapterzoo.pieces import Parameters, Piece, layers_of, misfit
from adapterzoo.registry import pieces
from adapterzoo.testing import CHECKS, Case, CheckFailedError, NoExampleError, checks_for, run_checks, strategies
from adapterzoo.testing.checks import values
from adapterzoo.testing.comparing import size
from adapterzoo.testing.options import candidates

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


pytest_plugins = ["pytester"]


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


def test_a_failure_is_expected_only_with_a_reason_and_then_has_to_come():
    kind = known(MUTANTS["ForgetsItsDropout"][0])
    [result] = [r for r in run_checks(kind, expected_failed_checks={"check_dropout": "not done"}) if r.expected]
    assert result.passed
    assert "drops nothing" in result.message
    [result] = [r for r in run_checks(known(Sound), expected_failed_checks={"check_text": "no reason"}) if r.expected]
    assert not result.passed
    assert result.message == "check_text was expected to fail (no reason), and passed"
    with pytest.raises(SpecError, match=r"no check 'check_txt'; known: .*; did you mean 'check_text'"):
        run_checks(Sound, expected_failed_checks={"check_txt": "why"})
    with pytest.raises(SpecError, match="check_text is expected to fail without a reason"):
        run_checks(Sound, expected_failed_checks={"check_text": " "})


TESTS = """
from adapterzoo import register
from adapterzoo.testing import parametrize_with_checks
from kit_mutants import MUTANTS, Sound

Broken = register(MUTANTS["ForgetsItsDropout"][0])


@parametrize_with_checks([register(Sound), Broken, "DoRA(Sound(r=1))"], expected_failed_checks=EXPECTED)
def test_pieces(piece, check):
    check(piece)
"""
EXPECTED = "lambda piece: {'check_dropout': 'not yet'} if piece is Broken else {}"


@pytest.mark.parametrize(
    ("expected", "counted"),
    [(EXPECTED, {"failed": 0, "xfailed": 1}), ("{}", {"failed": 1}), ("{'check_text': 'why'}", {"failed": 4})],
)
def test_pytest_runs_every_check_of_every_piece(pytester, expected, counted):
    """In the last one check_text is expected to fail on three pieces and passes, and check_dropout fails on one."""
    pytester.makepyfile(TESTS.replace("EXPECTED", expected))
    result = pytester.runpytest("-q", "-p", "no:cacheprovider", "-k", "check_text or check_dropout or check_draws")
    found = result.parseoutcomes()
    assert {name: found.get(name, 0) for name in counted} == counted
    assert sum(found[name] for name in found if name in ("passed", "failed", "xfailed")) == 9


# What is drawn.


class Options(Sound):
    """Every kind of option that can be drawn."""

    few: int = Field(ge=2, le=3)
    share: float = Field(default=0.7, gt=0, lt=1)
    kind: str | None = None
    pair: tuple[int, ...] = Field(default=(1,), min_length=1, max_length=2)
    flag: bool = False
    odd: dict[str, int] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("few", [2, 3]),
        ("share", [0.7, 0.25, 0.5, 0.1, 0.9]),
        ("kind", [None]),
        ("flag", [False, True]),
        ("odd", [{}]),
        ("pair", [(1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2)]),
    ],
)
def test_options_are_drawn_from_what_a_field_declares(field, expected):
    assert candidates(Options.model_fields[field]) == expected


def test_every_registered_piece_is_drawn_with_other_options_than_the_default():
    for kind in pieces().values():
        found = [case.piece for case in testing.check_values.cases(kind, draws=3)]
        own = [piece for spec in found for piece in layers_of(spec) if type(piece) is kind]
        assert all(any(type(piece) is kind for piece in layers_of(spec)) for spec in found)
        options = {tuple((name, repr(value)) for name, value in piece if name != "inner") for piece in own}
        assert len(options) > 1 or len(kind.model_fields) <= 1, kind


def test_a_case_has_the_same_bits_each_time_and_other_rounds_have_other_cases():
    first, again = (list(testing.check_values.cases("DoRA")) for _ in range(2))
    assert first == again
    assert not set(map(repr, first)) & set(map(repr, testing.check_values.cases("DoRA", seed=1)))
    assert list(testing.check_values.cases("DoRA", draws=2))[: len(first)] == first
    one, other = (first[3].perturbed().state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert eval(repr(first[3]), vars(testing)) == Case(repr(first[3].piece), *list(vars(first[3]).values())[1:])


def test_a_piece_is_checked_with_every_other_on_every_layer_and_two_deep():
    cases = list(testing.check_values.cases("DoRA"))
    chains = [[type(piece).__name__ for piece in layers_of(case.piece)] for case in cases]
    assert all("DoRA" in chain for chain in chains)
    for name, kind in pieces().items():
        inside = [chain for chain in chains if name in chain[chain.index("DoRA") + 1 :]]
        assert inside or not {"linear", "convolution", "embedding"} & kind.layers
    assert {case.layer for case in cases} == {"linear", "transposed", "convolution", "embedding"}
    assert {case.bias for case in cases} == {True, False}
    assert any(len(chain) == 3 for chain in chains)


def test_a_composition_with_its_published_rank_is_checked_on_layers_that_are_large_enough():
    layers = {case.layer for case in testing.check_values.cases("LoMAP")}
    assert layers == {"linear", "transposed", "convolution", "embedding"}


def test_the_environment_says_how_many_rounds(monkeypatch):
    one = len(list(testing.check_files.cases("DoRA")))
    monkeypatch.setenv("ADAPTERZOO_DRAWS", "3")
    assert len(list(testing.check_files.cases("DoRA"))) == 3 * one
    assert len(list(testing.check_files.cases("DoRA", draws=1))) == one
    monkeypatch.setenv("ADAPTERZOO_DRAWS", "many")
    with pytest.raises(SpecError, match="ADAPTERZOO_DRAWS=many would check nothing; give a whole number"):
        testing.check_files("DoRA")


class NeedsExamples(Sound):
    """Its only good option can't be guessed."""

    code: str

    def misfit(self, shape):
        return None if self.code == "swordfish" else "the code is wrong"


def test_a_piece_that_cannot_be_drawn_is_asked_for_examples():
    with pytest.raises(NoExampleError, match=r"NeedsExamples can't be checked: .*NeedsExamples.examples"):
        testing.check_text(NeedsExamples)

    class HasExamples(NeedsExamples):
        @classmethod
        def examples(cls, shape):
            return [{"code": "swordfish", "r": 1}]

    testing.check_values(known(HasExamples))


def test_a_declared_type_of_layer_that_nothing_fits_is_said():
    class RefusesKernels(Sound):
        def misfit(self, shape):
            return "no kernels" if shape.kernel else super().misfit(shape)

    with pytest.raises(NoExampleError, match="it declares convolution layers, and no options that were tried fit one"):
        testing.check_contract(known(RefusesKernels))


# Strategies.


@settings(max_examples=25)
@given(case=strategies.cases())
def test_drawn_cases_are_sound(case):
    assert misfit(case.piece, case.weight_shape, case.layer_type) is None
    testing.check_values(case)


@settings(max_examples=25)
@given(data=st.data(), name=strategies.names())
def test_drawn_specs_are_of_the_piece_that_was_asked_for(data, name):
    shape = WeightShape(6, 8)
    inside = data.draw(strategies.compositions(shape, depth=1))
    spec = data.draw(strategies.specs(name, shape, inside if "inner" in pieces()[name].model_fields else None))
    assert type(spec).__name__ == name
    assert isinstance(spec, Piece)


@settings(max_examples=25)
@given(site=strategies.sites(), seed=st.integers(0, 9))
def test_drawn_sites_are_those_of_the_layers(site, seed):
    spec = Sound(r=1)
    values = Parameters({**spec.init(site), "B": torch.ones(site.out_features, 1, dtype=site.dtype)})
    assert torch.allclose(spec.update(values, site).dense_update(), spec.dense(values, site))
    assert site.layer_type in ("linear", "convolution", "embedding")


# The shell.

MODULE = """
from adapterzoo import register
from kit_mutants import MUTANTS, Sound

Sound = register(Sound)
Broken = register(MUTANTS["ForgetsItsDropout"][0])
nothing = 3
"""


def shell(capsys, *arguments):
    code = main(["check", *arguments])
    return code, *capsys.readouterr()


def test_the_shell_prints_a_line_for_each_check(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    (tmp_path / "kit_shell_module.py").write_text(MODULE)
    names = ["--name", "check_text", "--name", "check_dropout"]
    code, out, _ = shell(capsys, "kit_shell_module:Sound", *names)
    assert (code, out.splitlines()[-1]) == (0, "2 of 2 checks passed")
    assert [line.split()[:2] for line in out.splitlines()[:-1]] == [["ok", "check_text"], ["ok", "check_dropout"]]
    code, out, _ = shell(capsys, "kit_shell_module:Broken", *names, "--draws", "2", "--seed", "3")
    assert code == 1
    assert "FAIL  check_dropout\n  ForgetsItsDropout fails check_dropout: " in out
    assert out.splitlines()[-1] == "1 of 2 checks passed"
    code, out, err = shell(capsys, "kit_shell_module:nothing")
    assert code == 2
    assert "'kit_shell_module:nothing' is no piece; derive it from adapterzoo.pieces.Generator or Wrapper" in err
    assert "'kit_shell_module:Sond' can't be imported" in shell(capsys, "kit_shell_module:Sond")[2]


def test_the_shell_takes_names_and_specs_and_refuses_the_rest(capsys):
    assert shell(capsys, "DoRA", "--name", "check_text")[0] == 0
    assert shell(capsys, "LoMAP", "--name", "check_text")[0] == 0
    assert shell(capsys, "MAP(DoRA(LoRA(r=2)))", "--name", "check_text")[0] == 0
    assert "did you mean 'LoRA'" in shell(capsys, "LoRa", "--name", "check_text")[2]
    assert "did you mean 'check_text'" in shell(capsys, "LoRA", "--name", "check_txt")[2]
    assert "draws=0 would check nothing" in shell(capsys, "LoRA", "--draws", "0")[2]
    with pytest.raises(UnknownPieceError):
        testing.check_text("LoRa")
    with pytest.raises(SpecError, match="checks take a class of pieces"):
        testing.check_text(3)


def test_a_piece_without_a_slow_truth_is_told_so(capsys):
    known(MUTANTS["BreaksItsPromise"][0])
    code, out, _ = shell(capsys, "BreaksItsPromise", "--name", "check_values")
    assert code == 0
    assert out.startswith("note  BreaksItsPromise has no dense() of its own")


@pytest.mark.parametrize(
    ("check", "share", "least"),
    [("check_values", 1e-7, 0.97), ("check_gradients", 1e-6, 0.85), ("check_dtypes", 0.5, 0.75)],
)
def test_the_comparisons_bite(check, share, least, monkeypatch):
    """An error of that share of what is compared is seen in nearly all cases; the others are zero by themselves."""
    seen = []

    def record(actual, expected, what, limit):
        seen.append(limit <= share * size(expected))

    monkeypatch.setattr(values, "differs", record)
    for name in ("DoRA", "MAP", "LoRA"):
        getattr(testing, check)(name)
    assert len(seen) > 50
    assert sum(seen) / len(seen) >= least, sum(seen) / len(seen)
