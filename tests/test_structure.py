"""The shape of the package: who may import whom, how light the import is, whether everything public is documented."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adapterzoo
from adapterzoo.registry import compositions, pieces

ROOT = Path(adapterzoo.__file__).parent
REPO = ROOT.parent

# Each room may import only rooms before it; names of rooms are modules or sub-packages of adapterzoo.
ROOMS = [
    "errors", "streams", "precision", "wide", "kept", "base", "quantised", "terms", "factored", "kernel", "functional",
    "forms", "sharded", "rules", "site", "shared", "pieces", "contract", "installed", "registry", "methods",
    "conditioning", "compositions", "adapter", "support", "watch", "layer", "merging", "targets", "plan", "surgery",
    "training", "checkpoint", "interop", "analysis", "catalogue", "ablation", "testing", "cli", "__main__",
]  # fmt: skip
# Pieces, and what carries them, never see each other: that is why any wrapper goes with any generator.
STRANGERS = {
    "methods": {"conditioning"},
    "conditioning": {"methods"},
    **{
        room: {"methods", "conditioning", "compositions"}
        for room in (
            "quantised",
            "forms",
            "adapter",
            "support",
            "watch",
            "layer",
            "merging",
            "targets",
            "plan",
            "surgery",
            "checkpoint",
            "analysis",
            "catalogue",
        )
    },
}


def imports_of(path):
    """Rooms of adapterzoo that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "adapterzoo":
            yield node.module.split(".")[1] if "." in node.module else "adapterzoo"
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("adapterzoo."))


def files():
    return [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_rooms_before_them(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert room in ROOMS, f"{room} has no place in the floor plan"
    for other in imports_of(path):
        if other == "adapterzoo":
            assert room == "ablation", f"{path.name} imports the package root from inside"
            continue
        assert ROOMS.index(other) <= ROOMS.index(room), f"{room} imports {other}, a room after it"
        assert other not in STRANGERS.get(room, ()), f"{room} must not know {other}"


def test_no_piece_is_named_where_all_pieces_are_served():
    names = set(pieces()) | set(compositions())
    for room in (
        "kept",
        "factored",
        "kernel",
        "functional",
        "forms",
        "quantised",
        "pieces",
        "registry",
        "adapter",
        "support",
        "layer",
        "targets",
        "plan",
        "surgery",
        "rules",
        "watch",
        "merging",
        "training",
        "checkpoint",
        "analysis",
        "installed",
        "catalogue",
    ):
        for path in [*ROOT.glob(f"{room}.py"), *(ROOT / room).glob("*.py")]:
            used = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            assert not used & names, f"{path.name} names {used & names}"


PROBE = """
import sys, time
import torch
start = time.process_time()
before = set(sys.modules)
import adapterzoo
print(time.process_time() - start)
print(" ".join(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


def test_the_import_is_light():
    """No more than torch's own import plus 0.3 s of processor time (best of three), and only the core's packages."""
    seconds, packages = [], ""
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, cwd=REPO)
        time, packages = out.stdout.strip().split("\n")
        seconds.append(float(time))
    assert min(seconds) <= 0.3, seconds
    core = {"adapterzoo", "einops", "pydantic", "pydantic_core", "annotated_types", "typing_extensions",
            "typing_inspection", "safetensors"}  # fmt: skip
    third_party = {
        name for name in packages.split() if name not in sys.stdlib_module_names and not name.startswith("_")
    }
    assert third_party <= core, third_party - core


def public_objects():
    for info in pkgutil.walk_packages([str(ROOT)], "adapterzoo."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != info.name:
                continue
            if inspect.isclass(value) or inspect.isfunction(value):
                yield f"{info.name}.{name}", value


def test_everything_public_is_documented():
    bare = [name for name, value in public_objects() if not (inspect.getdoc(value) or "").strip()]
    assert not bare
    for kind in pieces().values():
        for heading in ("Shapes:", "Example:", "Source:", "Deviations:"):
            assert heading in kind.__doc__, f"{kind.__name__} lacks {heading}"
    for function in compositions().values():
        assert "Source:" in function.__doc__


def test_every_piece_has_a_page_and_a_row():
    index = (REPO / "docs" / "index.md").read_text() + (REPO / "README.md").read_text()
    for name in pieces():
        assert (REPO / "docs" / "pieces" / f"{name.lower()}.md").exists()
        assert f"docs/pieces/{name.lower()}.md" in (REPO / "README.md").read_text()
    assert "algebra.md" in index


def test_a_method_stays_small():
    for path in [*(ROOT / "methods").glob("*.py"), *(ROOT / "conditioning").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 130, path.name


def test_what_is_imported_late_is_what_type_checkers_see():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If)).body
    assert {alias.asname: node.module for node in typed for alias in node.names} == adapterzoo._LATER
    for name, module in adapterzoo._LATER.items():
        assert getattr(adapterzoo, name) is getattr(importlib.import_module(module), name)
        assert name in dir(adapterzoo)
    with pytest.raises(AttributeError, match="no attribute 'sav'; did you mean 'save'"):
        _ = adapterzoo.sav


def test_a_star_gives_all_public_names_and_nothing_else():
    source = (ROOT / "__init__.py").read_text()
    assert sorted(adapterzoo.__all__) == sorted(set(re.findall(r" as (\w+)$", source, re.MULTILINE)))
    given: dict[str, object] = {}
    exec("from adapterzoo import *", given)
    assert set(given) - {"__builtins__"} == set(adapterzoo.__all__)
