"""README and docs: every Python block runs, every link leads somewhere, the figure of MAP's start says what it says."""

import importlib.util
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

from adapterzoo import registry
from benchmarks import page as page_of_figures

REPO = Path(__file__).parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def title(page):
    return str(page.relative_to(REPO))


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=title)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_PIECES", registry.pieces())  # a page may register a piece of its own
    # A module that stays: what a page leaves behind, such as a profiled or compiled function, may be looked up in it.
    module = sys.modules["__docs__" + page.stem] = ModuleType("__docs__" + page.stem)
    namespace = vars(module)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        for block in BLOCK.findall(page.read_text()):
            exec(compile(block, title(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{title(page)} links to {target}"


def test_the_readme_has_a_runnable_example():
    blocks = BLOCK.findall((REPO / "README.md").read_text())
    assert blocks
    assert max(len(block.splitlines()) for block in blocks) <= 20


def test_the_figure_of_maps_start_shows_what_the_page_says():
    spec = importlib.util.spec_from_file_location("map_start", REPO / "docs" / "figures" / "map_start.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    curves = module.curves(steps=150, seeds=1)
    final = {name: float(losses[:, -1].median()) for name, losses in curves.items()}
    assert final[module.DEFAULT] < final[module.LITERAL] / 10, final


def test_the_figures_of_the_speed_page_are_those_of_the_results():
    page = page_of_figures.PAGE.read_text()
    assert page_of_figures.filled(page) == page
    assert "<!-- figures:" in page


def test_every_test_that_the_page_of_invariants_names_is_there():
    named = re.findall(r"`(test_\w+)::(test_\w+)`", (REPO / "docs" / "invariants.md").read_text())
    assert len(named) > 60
    for file, test in named:
        assert re.search(rf"def {test}\(", (REPO / "tests" / f"{file}.py").read_text()), f"{file} has no {test}"
