"""`adapterzoo list` and `adapterzoo show`: what they print is what the pieces say and what a layer does."""

import json
import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adapterzoo as az
from adapterzoo import AdaptedLinear, register, registry
from adapterzoo.base import WeightShape
from adapterzoo.catalogue import listing
from adapterzoo.catalogue.docstrings import said
from adapterzoo.catalogue.facts import matrix, shown
from adapterzoo.cli import main
from adapterzoo.errors import MisfitError
from adapterzoo.pieces import Generator, Role, Wrapper
from benchmarks.counted import flops

REPO = Path(__file__).parent.parent
PAGE = (REPO / "docs" / "catalogue.md").read_text()
OURS = {name: kind for name, kind in registry.pieces().items() if kind.__module__.startswith("adapterzoo.")}
GENERATORS = [name for name, kind in OURS.items() if issubclass(kind, Generator)]
WRAPPERS = [name for name, kind in OURS.items() if issubclass(kind, Wrapper)]
SHAPE = WeightShape(64, 96)


def printed(capsys, *arguments):
    code = main(list(arguments))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def refused(capsys, *arguments):
    code = main(list(arguments))
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    return err


@pytest.fixture
def registered(monkeypatch):
    """Register a piece for one test."""
    monkeypatch.setattr(registry, "_PIECES", dict(registry._PIECES))
    return register


def test_every_piece_of_ours_is_listed_in_words_and_by_its_equation(capsys):
    text = printed(capsys, "list")
    for name, kind in OURS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        parts = said(kind)
        assert parts.what, name
        assert "=" in parts.equation, name
        assert parts.what in row
        assert row.endswith(f"  adapterzoo  {parts.equation.partition('. ')[0]}")
        assert ("W' = W  " in row) == kind.starts_neutral
    for name, function in registry.compositions().items():
        row = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert repr(function()) in row


def test_one_kind_alone(capsys):
    tables = {kind: printed(capsys, "list", f"--{kind}") for kind in listing.KINDS}
    assert [text.split()[0] for text in tables.values()] == list(listing.KINDS)
    assert "\n\n".join(text.rstrip("\n") for text in tables.values()) + "\n" == printed(capsys, "list")
    assert "MAP " not in tables["generators"]
    assert printed(capsys, "list", "--wrappers", "--generators").count("what it is") == 2


def test_what_can_not_be_loaded_stands_at_the_end(capsys, monkeypatch):
    monkeypatch.setattr(listing, "broken", lambda: ["other 1.0 (other): ImportError: no"])
    assert printed(capsys, "list").endswith("could not be loaded:\n  - other 1.0 (other): ImportError: no\n")


@pytest.mark.parametrize("kernel", [(), (3,), (3, 2)], ids=str)
@pytest.mark.parametrize(("out", "cols", "rank"), [(64, 96, 5), (31, 7, 3)])
def test_the_cost_of_lora_is_known_by_hand(out, cols, rank, kernel):
    shape = matrix(out, cols, kernel)
    found = shown(az.LoRA(r=rank), shape)
    size = shape.out_features * shape.in_features
    assert found.costs.base == (size, 0)
    assert found.costs.own == found.costs.lora == (size + rank * (shape.out_features + shape.in_features), 0)
    assert found.trained == found.costs.lora_trained == rank * (shape.out_features + shape.in_features)
    assert found.share == found.trained / size


DEEP = ["MAP(DoRA(LoRA(r=3)))", "SORA(PreDiag(FLoRA(r=(4, 2))))", "DoRA(Full())"]
ALONE = [*(f"{name}()" for name in GENERATORS), *(f"{name}(LoRA(r=2))" for name in WRAPPERS)]


@pytest.mark.parametrize("spec", ALONE + DEEP)
def test_the_cost_without_values_is_that_of_a_real_forward(spec):
    """By another counter, on a layer with values, that runs its own forward."""
    spec = az.parse(spec)
    cost = shown(spec, SHAPE).costs.own
    for tokens in (1, 5):
        layer = AdaptedLinear(nn.Linear(SHAPE.in_features, SHAPE.out_features), spec)
        x = torch.randn(tokens, SHAPE.in_features)
        assert flops(lambda layer=layer, x=x: layer(x)) == 2 * (tokens * cost.token + cost.call)


@pytest.mark.parametrize("spec", ["FLoRA(r=(4, 2))", "SORA(MAP(LoRA(r=3)))", "DoRA(AdaLoRA(r=3))"])
def test_of_a_convolution_it_is_that_of_an_output_position(spec):
    spec = az.parse(spec)
    cost = shown(spec, matrix(8, 6, (3, 2))).costs.own
    layer = AdaptedLinear(nn.Conv2d(6, 8, (3, 2)), spec)
    x = torch.randn(5, 6, 3, 2)
    assert flops(lambda: layer(x)) == 2 * (5 * cost.token + cost.call)


def test_what_a_composition_holds_is_what_the_layer_holds():
    spec = az.parse("MAP(DoRA(AdaLoRA(r=3)))")
    found, layer = shown(spec, SHAPE), AdaptedLinear(nn.Linear(96, 64), spec)
    assert found.trained == sum(value.numel() for value in layer.adapter.parameters())
    assert found.buffers == sum(value.numel() for value in layer.adapter.buffers()) == 3
    for facts, part in zip(found.pieces, layer.adapter.parts(), strict=True):
        assert {held.name: held.shape for held in facts.holds} == {n: tuple(v.shape) for n, v in part.values().items()}
        assert {held.name: held.role for held in facts.holds} == {n: role.value for n, role in part.roles.items()}


def test_what_layers_share_is_counted_with_the_buffers_and_marked(capsys):
    text = printed(capsys, "show", "VeRA(r=16)", "--shape", "64x96")
    assert re.search(r"A +buffer, shared by layers +\[16, 96\] +1,536", text)
    assert re.search(r"buffers +2,560", text)
    assert re.search(r"trained +80 ", text)


def test_a_page_has_everything(capsys):
    text = printed(capsys, "show", "MAP(LoRA(r=8))", "--shape", "4096x4096")
    for kind in (az.MAP, az.LoRA):
        parts = said(kind)
        flat = re.sub(r"\s+", " ", text)
        for piece_of_it in (
            parts.what,
            parts.equation,
            *(parts.sections[n] for n in ("Shapes", "Source", "Deviations")),
        ):
            assert re.sub(r"\s+", " ", piece_of_it) in flat
    assert re.search(r"A +direction\.input +\[8, 4096\] +32,768", text)
    assert re.search(r"trained +65,538 +0\.3906% of W", text)
    assert re.search(r"MAP\(LoRA\(r=8\)\) +16,842,752 +1\.0039 ", text)
    assert max(map(len, text.splitlines())) <= 120


def test_the_page_shows_what_the_program_prints(capsys):
    command, block = re.search(r"```sh\n(adapterzoo show .*?)\n```\n\n```text\n(.*?)\n```", PAGE, re.DOTALL).groups()
    spec, *rest = re.fullmatch(r'adapterzoo show "(.*?)" (.*)', command).groups()
    out = printed(capsys, "show", spec, *rest[0].split())
    assert out.endswith(block.removeprefix("...\n") + "\n")
    for command in ("list", "show"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert not [o for o in re.findall(r"--[\w-]+", capsys.readouterr().out) if o != "--help" and o not in PAGE]


def test_nothing_of_the_shape_is_made():
    """W would take 400 TB. (Norms go by blocks of rows, and there would be too many of those.)"""
    assert shown(az.PreDiag(az.LoRA(r=8)), WeightShape(10**7, 10**7)).costs.own.token > 10**14


class Largest(TorchDispatchMode):
    """The largest storage that holds values."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and not value.is_meta:
                self.size = max(self.size, value.numel())
        return result


@pytest.mark.parametrize("spec", ["SORA(MAP(DoRA(LoRA(r=8))))", "DoRA(Full())"])
def test_nothing_of_the_shape_is_made_for_norms_either(spec):
    with Largest() as made:
        shown(az.parse(spec), WeightShape(4096, 4096))
    assert made.size <= 4096


def test_json_says_what_the_page_says(capsys):
    tree = json.loads(printed(capsys, "show", "DoRA(LoRA(r=2))", "--shape", "64x96", "--json"))
    assert (tree["spec"], tree["trained"], tree["buffers"]) == ("DoRA(LoRA(r=2))", 2 * (64 + 96) + 64, 0)
    assert [piece["name"] for piece in tree["pieces"]] == ["DoRA", "LoRA"]
    assert tree["pieces"][0]["holds"] == [
        {"name": "magnitude", "role": "magnitude", "shape": [64], "numbers": 64, "trains": True, "shared": False}
    ]
    assert tree["costs"]["own"][0] == 64 * 96 + 2 * (64 + 96)


def test_beside_an_update_without_thin_columns_stands_the_lora_of_its_size():
    found = shown(az.Full(), WeightShape(64, 64))
    assert found.costs.lora_spec == "LoRA(r=32)"
    assert found.costs.lora_trained == found.trained


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["LoRA(r=8)", "--shape", "4096"], "--shape '4096' has 1 sizes; give OUTxIN, such as 4096x4096"),
        (["LoRA(r=8)", "--shape", "wide"], "--shape 'wide' can't be read; give OUTxIN, two whole numbers such as"),
        (["LoRA(r=8)", "--shape", "0x9"], "a weight of 0 x 9 is not between 1 x 1 and 2^33 elements"),
        (["LoRA(r=8)", "--shape", "9x" + "9" * 20], "can't be read; give OUTxIN, two whole numbers such as"),
        (["LoRA(r=8)", "--shape", "99999x9999999"], "a weight of 99999 x 9999999 is not between 1 x 1 and 2^33"),
        (["LoRA(r=8)", "--shape", "9x9", "--kernel", "3x3x3x3"], "--kernel '3x3x3x3' has 4 sizes; give one to three"),
        (["LoRA(r=8)", "--shape", "9x9", "--kernel", "-1"], "--kernel '-1' can't be read; give one to three"),
        (["LoRa(r=8)", "--shape", "9x9"], "unknown piece 'LoRa'; known pieces: "),
        (["LoRA(r=8", "--shape", "9x9"], "is not a spec such as MAP(LoRA(r=8))"),
        (["LoRA(r=8)", "--shape", "4x6"], "this layer (out=4, in=6) cannot take LoRA(r=8): r=8 is above min(out, in)"),
        (["LoRA(r=8)", "--size", "4x6"], "unknown option '--size'"),
    ],
)
def test_what_can_not_be_shown_is_a_sentence(capsys, arguments, sentence):
    assert sentence in refused(capsys, "show", *arguments)


def test_an_unknown_piece_has_a_nearest(capsys):
    assert refused(capsys, "show", "LoRa(r=8)").endswith("did you mean 'LoRA'?\n")


def test_a_piece_that_says_nothing_is_shown_with_what_is_missing(capsys, registered):
    @registered
    class Silent(Generator):
        roles: ClassVar = {"D": Role.UPDATE}
        starts_neutral = False
        layers = frozenset({"linear"})

        def init(self, site):
            return {"D": site.ones(site.out_features, site.in_features)}

        def update(self, params, site):
            return site.dense_update(params.D)

    text = printed(capsys, "show", "Silent()", "--shape", "4x6")
    assert "its docstring has no Source section" in text
    assert "starts beside W" in text
    assert re.search(r"Silent\(\) +48 +2\.0000", text)
    assert re.search(r"Silent +beside W +linear +test", printed(capsys, "list"))
    with pytest.raises(MisfitError, match="Silent sits on linear layers, and this is convolution"):
        shown(Silent(), matrix(4, 6, (3,)))


def test_a_piece_that_reads_values_is_shown_without_a_cost(capsys, registered):
    @registered
    class Reader(Generator):
        """A branch on a value: ΔW = D, where it is not zero."""

        roles: ClassVar = {"D": Role.UPDATE}

        def init(self, site):
            return {"D": site.zeros(site.out_features, site.in_features)}

        def update(self, params, site):
            return site.dense_update(params.D if params.D.sum() > 0 else -params.D)

    text = printed(capsys, "show", "DoRA(Reader())", "--shape", "4x6")
    assert "DoRA(Reader()) can't be counted without values: " in text
    assert "trained by LoRA(r=3)" in text
