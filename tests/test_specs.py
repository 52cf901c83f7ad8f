"""Specs: frozen, hashable, pasteable, strict; text and JSON; messages that say what would be valid."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import specs
from torch import nn

import adapterzoo as az
from adapterzoo import MAP, SORA, AdaLoRA, AdaptedLinear, DoRA, FLoRA, Full, LoRA, PreDiag, parse
from adapterzoo.errors import PieceError, SpecError, UnknownPieceError
from adapterzoo.pieces import Generator, Piece, Role, Wrapper
from adapterzoo.registry import compositions, pieces, register

BAD_TEXTS = {
    "MAP()": "MAP wraps something",
    "MAP(3)": r"'3' in 'MAP\(3\)' is not a piece",
    "MAP(LoRA)": r"write LoRA\(\) with brackets",
    "MAP(LoRA(), LoRA())": "MAP takes one inside",
    "LoRA(DoRA(LoRA()))": r"LoRA is a generator.*write DoRA\(LoRA\(...\)\)",
    "LoRA(8)": "not a piece such as",
    "LoRA(r=0)": "LoRA: r=0 is not valid: it should be a whole number ≥ 1",
    "LoRA(r=2.5)": "r=2.5 is not valid: it should be a whole number ≥ 1",
    "LoRA(r=True)": "r=True is not valid",
    "LoRA(alpha=0)": "alpha=0 is not valid: it should be a finite number > 0, or None for r",
    "LoRA(alpha=1e999)": "alpha=inf is not valid: it should be a finite number > 0",
    "LoRA(dropout=1)": "dropout=1 is not valid: it should be a number with 0 ≤ dropout < 1",
    "LoRA(dropuot=0.1)": "no field 'dropuot'.*did you mean 'dropout'",
    "SORA(LoRA(), map='cay')": "'cayley', 'exp' or 'first_order'",
    "MAP(LoRA(), floor=0)": 'floor=0 is not valid: it should be a finite number > 0, or "literal"',
    "FLoRA(r=(8,))": r"FLoRA: r=\(8,\) is not valid: it should be a whole number ≥ 1, a tuple \(r_out, r_in\)",
    "LORA(r=8)": "unknown piece 'LORA'; known pieces: .*did you mean 'LoRA'",
    "MAP(LoRA(r=8)": "is not a spec",
    "": "is not a spec",
    "LoRA(r=__import__('os').getpid())": "is not a number, string, True, False, None or tuple",
    "LoRA(r=1+1)": "is not a number",
    "LoRA(r={[]: 1})": "is not a number",
    "LoRA(r=1" + "0" * 400 + ")": "LoRA: ",
    "LoRA(r=4, r=8)": "LoRA got r twice|keyword argument repeated",
    "LoRA(**{'r': 8})": "has no place in a spec",
    "az.LoRA(r=8)": "is not a piece",
    "LoMAP(rank=8)": "LoMAP",
    "[LoRA()]": "is not a piece",
    "LoRA(" * 3000: "longest|not a spec",
}


@given(specs(9, 9))
def test_text_and_json_round_trip(spec):
    assert parse(repr(spec)) == parse(str(spec)) == spec
    assert az.from_json(az.to_json(spec)) == spec
    assert json.loads(az.to_json(spec))["schema"] == 1
    assert len({spec, parse(repr(spec)), az.from_json(az.to_json(spec))}) == 1


@pytest.mark.parametrize("text", BAD_TEXTS, ids=lambda text: text[:40] or "empty")
def test_bad_text_says_what_is_wrong(text):
    with pytest.raises(SpecError, match=BAD_TEXTS[text]):
        parse(text)


@given(st.text(max_size=60))
def test_any_text_is_a_spec_or_a_spec_error(text):
    try:
        assert isinstance(parse(text), Piece)
    except SpecError:
        pass


def test_parse_of_something_else():
    with pytest.raises(SpecError, match="not int"):
        parse(3)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["LoRA", "MAP"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["schema", "piece", "inner", "r", "alpha", "x"]), inner, max_size=5)
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_json_is_a_spec_or_a_spec_error(tree):
    if isinstance(tree, dict):
        tree = {"schema": 1, **tree}
    try:
        assert isinstance(az.from_json(json.dumps(tree)), Piece)
    except SpecError:
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "found list"),
        ('{"schema": 2, "piece": "LoRA"}', '"schema": 1; found 2'),
        ('{"schema": 1, "piece": "LoRA", "self": 3}', "no field 'self'"),
        (None, "from_json reads text, not NoneType"),
        ('{"schema": true, "piece": "LoRA"}', "found True"),
        ('{"schema": 1, "piece": "LoRA", "r": 4, "r": 8}', "the key 'r' stands twice"),
        ('{"schema": 1, "piece": "LoRA", "rank": 3}', "no field 'rank'"),
        ('{"schema": 1, "piece": "LoRa"}', "did you mean 'LoRA'"),
        ('{"schema": 1, "piece": "MAP"}', "MAP wraps something"),
        ('{"schema": 1, "piece": "LoMAP"}', "unknown piece"),
    ],
)
def test_bad_json_says_what_is_wrong(text, message):
    with pytest.raises(SpecError, match=message):
        az.from_json(text)


def test_specs_are_frozen_and_equal_by_value():
    spec = MAP(LoRA(r=8))
    with pytest.raises(SpecError, match=r"specs are frozen, MAP.inner too; build another one"):
        spec.inner = LoRA(r=4)
    assert spec == MAP(LoRA(r=8))
    assert LoRA(r=8).model_copy(update={"r": 16}) == LoRA(r=16)
    assert LoRA(r=8, alpha=4).model_copy(update={"r": 16}) == LoRA(r=16, alpha=4)
    with pytest.raises(SpecError, match="r=-3 is not valid"):
        LoRA(r=8).model_copy(update={"r": -3})
    assert FLoRA(r=8) == FLoRA(r=(8, 8)) != FLoRA(r=(8, 4))
    assert LoRA(r=8) == LoRA(r=8, alpha=8) == LoRA(r=8, alpha=None)
    assert LoRA(r=8) != LoRA(r=8, alpha=16)
    assert LoRA(r=8) != AdaLoRA(r=8)
    assert repr(MAP(DoRA(LoRA(r=8, alpha=16)))) == "MAP(DoRA(LoRA(r=8, alpha=16)))"
    assert repr(SORA(PreDiag(FLoRA(r=(4, 2))))) == "SORA(PreDiag(FLoRA(r=(4, 2))), rank=4)"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MAP(LoRA), r"MAP wraps a spec, but got the class LoRA; build it: LoRA\(...\)"),
        (lambda: MAP("LoRA(r=8)"), r"MAP wraps a spec such as .* \(str\); parse\(text\) reads one"),
        (lambda: MAP(LoRA(), inner=LoRA()), "twice"),
        (lambda: LoRA(8), r"as keywords, such as LoRA\(r=8\)"),
        (lambda: LoRA(DoRA(LoRA())), "LoRA is a generator"),
        (lambda: LoRA(rslora="yes"), "rslora='yes' is not valid"),
        (lambda: LoRA(r=8, alpha=float("nan")), "finite"),
    ],
)
def test_bad_python_says_what_is_wrong(build, message):
    with pytest.raises(SpecError, match=message):
        build()


def test_named_compositions():
    assert (
        az.LoMAP(r=4, alpha=2, dropout=0.1)
        == MAP(LoRA(r=4, alpha=2, dropout=0.1))
        == parse("LoMAP(r=4, alpha=2, dropout=0.1)")
    )
    assert az.AdaLoMAP(r=4) == MAP(AdaLoRA(r=4))
    assert az.FLoMAP(r=(4, 2), scale=2.0) == MAP(FLoRA(r=(4, 2), scale=2.0))
    expected = SORA(PreDiag(LoRA(r=16, alpha=32)), rank=4, map="first_order", damping=1.0)
    assert az.PublishedSORA() == expected
    assert DoRA(az.LoMAP(r=4)) == parse("DoRA(LoMAP(r=4))")


def test_scales():
    assert LoRA(r=4, alpha=6).scale == 1.5
    assert LoRA(r=4, alpha=6, rslora=True).scale == 3.0
    assert AdaLoRA(r=4).scale == 1.0


def test_the_registry_knows_every_public_piece():
    assert {"LoRA", "AdaLoRA", "FLoRA", "Full", "MAP", "DoRA", "PreDiag", "SORA"} <= set(pieces())
    assert {"LoMAP", "AdaLoMAP", "FLoMAP", "PublishedSORA"} <= set(compositions())
    assert pieces()["Full"] is Full


def test_registration_refuses_what_breaks_the_contract():
    with pytest.raises(PieceError, match="derive it from"):
        register(int)
    with pytest.raises(PieceError, match="does not define init, update"):
        register(type("Empty", (Generator,), {}))
    body = {"init": lambda self, site: {}, "update": lambda self, params, site: None, "__module__": __name__}
    with pytest.raises(PieceError, match="must give every parameter a Role"):
        register(type("NoRoles", (Generator,), dict(body)))
    with pytest.raises(PieceError, match="the name 'LoRA' is taken"):
        register(type("LoRA", (Generator,), {**body, "roles": {"A": Role.CORE}}))
    assert pieces()["LoRA"] is LoRA


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UnknownPieceError) as caught:
        parse("Dora(LoRA())")
    for name in pieces():
        assert name in str(caught.value)
    assert "did you mean 'DoRA'" in str(caught.value)


def piece_that(name, kind=Generator, **methods):
    """An unregistered piece with one parameter A: [out, 2] and the given methods."""
    body = {
        "roles": {"A": Role.OUTPUT_FACTOR},
        "__module__": __name__,
        "init": lambda self, site: {"A": site.zeros(5, 2)},
    }
    body["update" if kind is Generator else "condition"] = lambda self, *arguments: None
    return type(name, (kind,), {**body, **methods})


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (
            piece_that("NoTensor", init=lambda self, site: {"A": 0.0})(),
            r"NoTensor \(of test_specs\).init made A a float, not a tensor",
        ),
        (
            piece_that("OtherNames", init=lambda self, site: {"B": site.zeros(1)})(),
            r"OtherNames \(of test_specs\).init made \['B'\]",
        ),
        (
            piece_that("NoMapping", init=lambda self, site: site.zeros(1))(),
            r"NoMapping \(of test_specs\).init made Tensor",
        ),
        (
            piece_that("AMatrix", update=lambda self, p, site: p.A)(),
            r"AMatrix \(of test_specs\) on this layer returned a Tensor; return site",
        ),
        (
            piece_that("Swapped", update=lambda self, p, site: site.low_rank(site.zeros(2, 7), p.A))(),
            r"Swapped \(of test_specs\) on this layer made U \[2, 7\] and V \[5, 2\]; need \[5, r\] and \[r, 7\]",
        ),
        (
            piece_that("Flat", update=lambda self, p, site: site.dense_update(p.A))(),
            r"Flat \(of test_specs\) on this layer made an update \[5, 2\]; need \[5, 7\]",
        ),
        (
            piece_that("Columns", Wrapper, condition=lambda self, w, p, site: w.calibrate_base(site.ones(7)))(
                LoRA(r=2)
            ),
            r"Columns \(of test_specs\).condition on this layer: a gain of rows has the shape \[7\]; need \[5\]",
        ),
        (
            piece_that("Dense", Wrapper, condition=lambda self, w, p, site: site.dense_update(w.dense_update()))(
                LoRA(r=2, dropout=0.5)
            ),
            r"Dense \(of test_specs\) on this layer lost its inside's dropout=0.5",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Piece) else "",
)
def test_what_breaks_the_contract_says_whose_fault_it_is(piece, message):
    with pytest.raises(PieceError, match=message):
        AdaptedLinear(nn.Linear(7, 5), piece)(torch.randn(2, 7))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"optional": "A"}, "`optional` is 'A'; it should be a frozenset of names"),
        ({"layers": "linear"}, "`layers` is 'linear'; it should be a frozenset of names"),
        ({"layers": frozenset({"conv"})}, r"`layers` is \['conv'\]; it should be some of \['convolution', 'embedding'"),
        ({"shared": frozenset({"A"})}, "`shared` names 'A', which trains"),
        ({"rank_axes": {"Q": 0}}, r"`rank_axes` names \['Q'\], which `roles` does not declare"),
        ({"roles": {"A.x": Role.CORE}}, "the parameter name 'A.x' is no plain name"),
        ({"roles": {"inner": Role.CORE}}, "the parameter name 'inner' belongs to every module"),
        (
            {"__annotations__": {"dims": list}, "dims": [1]},
            "the default of 'dims' can be changed, and a spec is frozen",
        ),
    ],
    ids=str,
)
def test_odd_declarations_are_refused_at_registration(body, message):
    with pytest.raises(PieceError, match="Odd can't be registered: .*" + message):
        register(piece_that("Odd", **body))
    assert "Odd" not in pieces()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"misfit": lambda self, shape: False}, r"Odd.misfit \(of test_specs\) returned False; it should say in words"),
        (
            {"update": lambda self, p, site: site.low_rank(p.A.mul_(2), site.zeros(2, 7))},
            "is not pure: update writes into its parameter 'A'",
        ),
        (
            {"update": lambda self, p, site: site.low_rank(torch.randn(5, 2), site.zeros(2, 7))},
            "is not pure: update returned something else the second time",
        ),
        ({"init": lambda self, site: {"A": torch.randn(5, 2)}}, "is not pure: init made another 'A' the second time"),
        ({"init": lambda self, site: {"A": torch.zeros(())}}, "made A a tensor without dimensions; make a scalar"),
    ],
    ids=["misfit", "in place", "random", "random start", "no dimensions"],
)
def test_what_is_not_pure_or_odd_is_told_at_the_first_layer(methods, message):
    usable = {"update": lambda self, p, site: site.low_rank(p.A, site.zeros(2, 7))}
    with pytest.raises(PieceError, match=message):
        AdaptedLinear(nn.Linear(7, 5), piece_that("Odd", **{**usable, **methods})())


def test_an_unregistered_piece_is_not_written():
    piece = piece_that("Unregistered")()
    with pytest.raises(SpecError, match="Unregistered is not registered, so nothing could read it back"):
        az.to_json(MAP(piece))


def test_a_class_may_be_defined_again(monkeypatch):
    monkeypatch.setattr(az.registry, "_PIECES", pieces())
    first, second = piece_that("Again"), piece_that("Again")
    assert register(first) is first
    assert register(second) is second
    assert pieces()["Again"] is second


def test_more_bad_text_and_names():
    with pytest.raises(SpecError, match="the longest is"):
        parse("LoRA(" + " " * 10_001 + ")")
    assert parse("MAP(inner=LoRA(r=8))") == MAP(LoRA(r=8))
    with pytest.raises(SpecError, match=r"r=\[1\] is not valid"):
        LoRA(r=[1])
    assert register(LoRA) is LoRA
    with pytest.raises(PieceError, match="must give every parameter a Role"):
        register(piece_that("TextRoles", roles={"A": "x"}))
    with pytest.raises(PieceError, match="the name 'LoMAP' is taken"):
        register(piece_that("LoMAP"))

    def LoRA_again():
        return LoRA()

    LoRA_again.__name__ = "LoRA"
    with pytest.raises(PieceError, match="the name 'LoRA' is taken"):
        az.composition(LoRA_again)
