"""The outside package of examples/: installed from its own pyproject.toml, used by processes that never import it."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from adapterzoo import registry

SOURCE = Path(__file__).parent.parent / "examples" / "adapterzoo-smooth"
PIECES = SOURCE / "adapterzoo_smooth" / "__init__.py"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that the package is installed into. A copy is built: building writes beside the sources."""
    folder = tmp_path_factory.mktemp("outside")
    source = shutil.copytree(SOURCE, folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    options = ["--no-build-isolation", "--no-deps", "--target", str(folder / "site"), str(source)]
    done = subprocess.run([*pip, *options], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture
def fresh(installed, tmp_path):
    """Run Python in a process of its own, in an empty folder, where the package is installed."""

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_generator_has_15_lines_and_the_wrapper_20():
    classes = [node for node in ast.parse(PIECES.read_text()).body if isinstance(node, ast.ClassDef)]
    lines = {node.name: node.end_lineno - node.decorator_list[0].lineno + 1 for node in classes}
    assert lines["Cosines"] <= 15
    assert lines["Contrast"] <= 20
    assert not {"Cosines", "Contrast"} & set(registry.pieces())  # the package is not installed beside the tests


ASK = """
    from adapterzoo.cli import main

    assert main(["list"]) == 0
    assert main(["show", "Contrast(Cosines(r=8))", "--shape", "64x32", "--json"]) == 0
"""


def test_the_list_names_both_and_show_knows_their_cost(fresh):
    text = fresh("-c", textwrap.dedent(ASK))
    for name in ("Cosines", "Contrast"):
        assert re.search(rf"^{name} .* adapterzoo-smooth 0\.1\.0  .*=.*", text, re.MULTILINE)
    tree = json.loads(text[text.index("{\n") :])
    assert (tree["trained"], tree["costs"]["own"][0]) == (8 * 64 + 1, 64 * 32 + 8 * (64 + 32))


SAVE = """
    import torch
    import adapterzoo as az

    spec = az.parse("MAP(Contrast(Cosines(r=3)))")
    assert az.from_json(az.to_json(spec)) == spec
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Conv1d(5, 4, 3))
    az.adapt(model, spec, targets=["0", "1"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    az.save(model, "adapter")
    torch.save([layer.effective_weight() for layer in model], "weights")
"""
LOAD = """
    import sys, torch
    import adapterzoo as az

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Conv1d(5, 4, 3))
    assert "adapterzoo_smooth" not in sys.modules
    az.load(model, "adapter")
    for layer, weight in zip(model, torch.load("weights"), strict=True):
        assert layer.effective_weight().equal(weight) and not layer.weight.equal(weight)
    az.merge(model)
    az.unmerge(model)
    print(repr(model[1].spec))
"""


def test_a_file_is_loaded_by_a_process_that_never_imported_the_package(fresh):
    fresh("-c", textwrap.dedent(SAVE))
    assert fresh("-c", textwrap.dedent(LOAD)) == "MAP(Contrast(Cosines(r=3)))\n"


def test_the_kit_passes_by_the_packages_own_test_file(fresh):
    text = fresh("-m", "pytest", "-q", "-p", "no:cacheprovider", str(SOURCE / "tests"))
    assert int(re.search(r"^(\d+) passed", text, re.MULTILINE).group(1)) > 25


def test_and_from_the_shell(fresh):
    names = ["--name", "check_contract", "--name", "check_values", "--name", "check_promises"]
    text = fresh("-m", "adapterzoo", "check", "adapterzoo_smooth:Contrast", *names)
    assert text.endswith("3 of 3 checks passed\n")


GRID = """
    name: outside
    task: {name: digits, steps: 4, looks: 2, pretraining: 5, train: 40, validation: 40, test: 40, batch: 8}
    grid:
      spec: ["Cosines(r=2)"]
      wrap: ["{spec}", "MAP({spec})"]
      seed: {count: 1}
"""


def test_a_grid_runs_it_and_reports(fresh, tmp_path):
    (tmp_path / "grid.yaml").write_text(textwrap.dedent(GRID))
    text = fresh("-m", "adapterzoo", "ablate", "grid.yaml", "--workers", "1")
    assert "2 runs done, 0 failed" in text
    assert re.search(r"^ Cosines +bare ", text, re.MULTILINE)
    assert re.search(r"^ Cosines +MAP ", text, re.MULTILINE)
