"""The task of the study: pairs that give nothing away, sets that share nothing, draws that stay as they are."""

import ast
import dataclasses
import json
import platform
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from adapterzoo.ablation.docstrings import (
    FEWEST_WORDS,
    LEFT_OUT,
    MASK,
    TEST,
    VALIDATION,
    Pair,
    candidates,
    fingerprint,
    first_paragraph,
    masked,
    pairs_of,
    split,
    standard_library,
    unrepeated,
)
from adapterzoo.ablation.minilm import contrast, embed, embed_all, encoder, ranks_of_own, tokenise
from studies.page import RESULTS

SOURCE = '''
class Box:
    """Not a function."""

    def Open(self, path):
        """Open the box at
        this path, and OPEN it again; reopen is another word.

        A second paragraph.
        """

        def inner():
            """Half of a docstring that has words enough."""

        class Lid:
            """A class that is a docstring alone."""

        return self.Open(path) or open_all(path)  # a comment

    def close(self):
        """Too short here."""
        return 1

async def wait(x):
    "Wait until x is there."
    await x
'''


def toy(sizes):
    """Packages with so many pairs each."""
    return [
        Pair(name, (f"{name}.py", line, "f"), f"does {name} {line}", f"def masked():\n    {name}({line})")
        for name, size in sizes.items()
        for line in range(size)
    ]


# Pairs


def test_a_pair_is_the_first_paragraph_and_the_code_without_docstrings_and_names():
    opened, inner, wait = pairs_of(SOURCE, Path("boxes/box.py"))
    assert opened.package == inner.package == wait.package == "boxes"
    assert opened.place == ("boxes/box.py", 5, "Open")
    assert opened.docstring == "masked the box at this path, and masked it again; reopen is another word."
    assert opened.code == (
        "def masked(self, path):\n\n    def inner():\n        pass\n\n    class Lid:\n        pass\n"
        "    return self.masked(path) or open_all(path)"
    )
    assert inner.docstring == "Half of a docstring that has words enough."
    assert wait.code == "async def masked(x):\n    await x"


def test_what_is_no_python_has_no_pairs():
    assert not list(pairs_of("def f(:", Path("broken.py")))
    assert not list(pairs_of("", Path("empty.py")))
    assert [pair.package for pair in pairs_of("def f(x):\n    'One two three four.'\n    return x", Path("m.py"))] == [
        "m"
    ]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("get", "Get it, get_all gets it; forget.", "masked it, get_all gets it; forget."),
        ("_get", "_get and get", "masked and get"),
        ("a+b", "a+b a b", "masked a b"),
    ],
)
def test_a_name_is_masked_where_it_is_a_whole_word(name, text, expected):
    assert masked(text, name) == expected


def test_the_first_paragraph_ends_at_an_empty_line():
    assert first_paragraph("  one\n   two\n  \n three") == "one two"


def test_texts_that_come_again_are_left_out():
    first = Pair("a", ("a.py", 1, "f"), "one", "x")
    same_text = dataclasses.replace(first, place=("a.py", 2, "g"), code="y")
    same_code = dataclasses.replace(first, place=("a.py", 3, "h"), docstring="two")
    other = dataclasses.replace(first, docstring="three", code="z")
    assert list(unrepeated([first, same_text, same_code, other])) == [first, other]


# The standard library


def test_there_are_thousands_of_pairs_and_none_is_there_twice():
    pairs = standard_library()
    assert len(pairs) > 3000
    assert len({pair.docstring for pair in pairs}) == len({pair.code for pair in pairs}) == len(pairs)
    assert not [pair for pair in pairs if LEFT_OUT & set(Path(pair.place[0]).parts)]


def test_no_function_gives_its_name_away():
    for pair in standard_library():
        name = re.compile(rf"(?<!\w){re.escape(pair.place[2])}(?!\w)", re.IGNORECASE)
        assert not name.search(pair.docstring + "\n" + pair.code), pair
        assert f"def {MASK}(" in pair.code


def test_every_code_is_a_function_without_docstrings():
    for pair in standard_library()[::7]:
        assert len(pair.docstring.split()) >= FEWEST_WORDS
        for node in ast.walk(ast.parse(pair.code)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                assert ast.get_docstring(node) is None, pair


def test_no_package_and_no_text_is_in_two_sets():
    parts = split(standard_library())
    sets = [parts.train, parts.validation, parts.test]
    assert [len(part) for part in sets[1:]] == [VALIDATION, TEST]
    assert len(parts.train) > len(standard_library()) / 2
    for of in (lambda pair: pair.package, lambda pair: pair.docstring, lambda pair: pair.code, lambda pair: pair.place):
        seen = [{of(pair) for pair in part} for part in sets]
        assert len(set.union(*seen)) == sum(map(len, seen))


def test_the_pairs_are_those_of_the_published_results():
    found = json.loads(RESULTS.read_text())
    if found["machine"]["python"] != platform.python_version():
        pytest.skip("another Python has another standard library")
    assert found["data"]["fingerprint"] == fingerprint(standard_library())
    assert found["data"]["pairs"] == len(standard_library())


def test_reading_again_gives_the_same():
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted({Path(pair.place[0]) for pair in standard_library() if pair.package in {"email", "heapq", "json"}})
    assert len(paths) > 5
    again = [pair for path in paths for pair in pairs_of((root / path).read_bytes(), path)]
    known = {pair.place: pair for pair in standard_library()}
    assert [pair for pair in again if pair.place in known] == [
        pair for pair in known.values() if Path(pair.place[0]) in paths
    ]


# Sets and candidates


def test_packages_go_to_one_set_each_whatever_their_order():
    pairs = toy({name: 3 + index for index, name in enumerate("abcdefghij")})
    parts = split(pairs, tested=10, validated=6)
    assert [len(parts.test), len(parts.validation)] == [10, 6]
    again = split(pairs[::-1], tested=10, validated=6)
    for one, other in zip(
        (parts.train, parts.validation, parts.test), (again.train, again.validation, again.test), strict=True
    ):
        assert {pair.package for pair in one} == {pair.package for pair in other}


def test_candidates_are_the_own_function_then_its_package_then_others():
    pairs = toy({"a": 5, "b": 12})
    drawn = candidates(pairs, count=8)
    assert drawn.shape == (17, 8)
    assert drawn[:, 0].tolist() == list(range(17))
    for own, row in enumerate(drawn.tolist()):
        assert len(set(row)) == 8
        alike = [pairs[other].package == pairs[own].package for other in row]
        assert alike == ([True] * 5 + [False] * 3 if own < 5 else [True] * 8)
    assert len({tuple(sorted(row)) for row in drawn[5:].tolist()}) > 1  # drawn for each, not the first of the package


def test_candidates_repeat_themselves_and_leave_the_global_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert candidates(toy({"a": 9}), 4).equal(candidates(toy({"a": 9}), 4))
    assert torch.get_rng_state().equal(before)


def test_too_few_pairs_for_the_candidates_is_an_error():
    with pytest.raises(ValueError, match="3 pairs can't give 4 candidates each; take count ≤ 3"):
        candidates(toy({"a": 3}), 4)


def test_the_fingerprint_sees_every_text_and_the_order():
    pairs = toy({"a": 2, "b": 2})
    fields = ("package", "docstring", "code")
    others = [[dataclasses.replace(pairs[0], **{field: "other"}), *pairs[1:]] for field in fields]
    others += [pairs[::-1], pairs[:-1]]
    assert len({fingerprint(item) for item in [pairs, *others]}) == 6


# The model


@pytest.fixture(scope="module")
def minilm():
    return encoder().eval()


TEXTS = ["Sort the list in place.", "The weather is fine today, and the birds sing.", "Open a file."]
ALIKE = ["order the items of this list", "sunny skies with songbirds", "read from disk with a file handle"]


def test_the_published_weights_know_what_is_alike(minilm):
    texts, alike = (embed_all(minilm, tokenise(part, 16)) for part in (TEXTS, ALIKE))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(3))
    assert (texts @ alike.T).argmax(dim=1).tolist() == [0, 1, 2]


def test_neither_padding_nor_company_changes_an_embedding(minilm):
    together = embed_all(minilm, tokenise(TEXTS, 16), batch=2)
    for text, expected in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(embed(minilm, tokenise([text], 16))[0], expected, atol=1e-5, rtol=1e-4)


def test_texts_are_cut_off():
    found = tokenise(TEXTS, 8)
    assert found.ids.shape == (3, 8)
    assert found.mask.sum(dim=1).tolist() == [8, 8, 6]
    assert found.pick(torch.tensor([2])).ids.shape == (1, 6)


def test_the_contrast_is_low_where_each_finds_its_own():
    vectors = torch.eye(4)
    assert contrast(vectors, vectors).item() == pytest.approx(0, abs=1e-6)
    half = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    expected = torch.log1p(torch.exp(torch.tensor(-0.2 / 0.05)))  # the own code is nearer by 0.2
    torch.testing.assert_close(contrast(half, torch.tensor([[0.8, 0.6], [0.6, 0.8]])), expected)
    assert contrast(vectors, vectors.roll(1, 0)).item() == pytest.approx(20, abs=1e-3)


def test_a_place_is_one_more_than_those_as_near():
    docstrings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    codes = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    rows = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 1, 0]])
    assert ranks_of_own(docstrings, codes, rows).tolist() == [1, 3, 2]


def test_the_ablation_does_not_import_transformers():
    probe = (
        "import sys, adapterzoo.ablation.docstrings; print(sorted({'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
