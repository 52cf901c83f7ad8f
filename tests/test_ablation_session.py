"""Grids from end to end, in real processes: run, reported, killed and taken up again."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from adapterzoo.ablation import Grid, Settings
from adapterzoo.ablation.command import add_ablate
from adapterzoo.ablation.driving import ablate
from adapterzoo.ablation.runs.folder import read_grid, records_of
from adapterzoo.ablation.runs.store import Store
from adapterzoo.cli import main
from adapterzoo.errors import GridError
from tests import ablation_toys  # noqa: F401  (registers the task "toy")

ROOT = Path(__file__).parents[1]
TOY = {
    "task": {"name": "toy"},
    "grid": {"spec": ["LoRA(r=2)", "FLoRA(r=2)"], "wrap": ["{spec}", "MAP({spec})"], "seed": {"count": 3}},
    "tune": {"lr": [1e-3, 1e-2]},
}
RUNS = 4 * (2 + 3)
DIGITS = """
name: few
task: {name: digits, steps: 4, looks: 2, pretraining: 5, train: 40, validation: 40, test: 40, batch: 8}
references: ["None"]
grid:
  spec: ["AdaLoRA(r=2)"]
  wrap: ["{spec}", "MAP({spec})"]
  seed: {count: 2}
tune: {lr: [1e-2, 3e-2]}
"""


def grid(**task):
    return Grid.of({**TOY, "task": {"name": "toy", **task}})


def records(folder):
    """Every finished run as it stands, without what may differ: times and where it happened."""
    store = Store(folder)
    found = {}
    for run in store.ended():
        result = store.result(run)
        lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
        with np.load(folder / run / "examples.npz") as examples:
            columns = {name: examples[name].tolist() for name in examples}
        metrics = {name: value for name, value in result["metrics"].items() if name not in ("ms_per_step", "seconds")}
        found[run] = (json.loads((folder / run / "run.json").read_text()), metrics, columns, len(lines))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A toy grid that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    grid().run(folder, engine="local", engine_options={"workers": 2})
    return folder


def test_a_grid_runs_in_processes_of_its_own_and_gives_its_results(whole):
    assert len(records(whole)) == RUNS
    results = grid().run(whole, engine="inline")  # everything is there: nothing is left to run
    assert (results.runs["status"] == "done").all()
    assert results.runs["role"].value_counts().to_dict() == {"report": 12, "tune": 8}
    processes = set(results.environments["process"])
    assert len(processes) == RUNS
    assert os.getpid() not in processes


def test_a_run_that_raises_dies_or_leaves_ends_alone(tmp_path):
    task = {"fails": "FLoRA(r=2)", "dies": "MAP(LoRA", "ends": "MAP(FLoRA"}
    results = grid(**task).run(tmp_path, engine="local", engine_options={"workers": 2})
    runs = results.runs[results.runs["role"] == "tune"].set_index("cell")
    assert set(runs.loc["LoRA(r=2)", "status"]) == {"done"}
    assert all("was asked to fail" in error for error in runs.loc["FLoRA(r=2)", "error"])
    assert all("SIGKILL" in error for error in runs.loc["MAP(LoRA(r=2))", "error"])
    assert len(list(Store(tmp_path).ended())) == 8 + 3  # only what was tuned is reported
    traced = [trace for trace in results.tracebacks.values() if trace]
    assert any("ablation_toys.py" in trace for trace in traced)


def test_every_engine_here_gives_the_same_results(tmp_path):
    few = Grid.from_yaml(DIGITS)
    for name, engine, options in (("inline", "inline", {}), ("local", "local", {"workers": 2})):
        few.run(tmp_path / name, engine=engine, engine_options=options)
    assert len(records(tmp_path / "inline")) == 3 * (2 + 2)
    assert records(tmp_path / "inline") == records(tmp_path / "local")
    # A process that begins with nothing imports everything first, so this one takes the head alone.
    head = Grid.of({**few.model_dump(), "references": [], "grid": {"spec": ["None"], "seed": [0]}, "tune": None})
    head.run(tmp_path / "fresh", engine_options={"fresh": True, "workers": 1})
    head.run(tmp_path / "warm", engine_options={"workers": 1})
    assert len(records(tmp_path / "fresh")) == 1
    assert records(tmp_path / "fresh") == records(tmp_path / "warm")


def test_shared_processes_give_the_results_of_separate_ones_to_round_off(tmp_path):
    few = Grid.from_yaml(DIGITS)
    few.run(tmp_path / "apart", engine="inline")
    few.run(tmp_path / "packed", engine="inline", settings=Settings(pack=4))
    apart, packed = records(tmp_path / "apart"), records(tmp_path / "packed")
    assert apart.keys() == packed.keys()
    for run, (_, metrics, columns, _) in apart.items():
        assert packed[run][1]["validation/loss"] == pytest.approx(metrics["validation/loss"], rel=1e-4)
        assert packed[run][2]["id"] == columns["id"]


def test_the_shell_runs_a_grid_and_reports_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(DIGITS.replace("name: few\n", ""))
    assert main(["ablate", "small.yaml", "--check"]) == 0
    assert "3 cells: 6 runs to choose options, 6 to report" in capsys.readouterr().out
    assert not Path("runs").exists()
    assert main(["ablate", "small.yaml", "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "12 runs done" in out
    assert main(["ablate", "small.yaml", "--workers", "2"]) == 0
    assert "0 runs done, 12 found done" in capsys.readouterr().out
    assert main(["report", "runs/small", "--format", "csv,html"]) == 0
    assert (tmp_path / "runs/small/report/report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "can't be read"),
        (["recipe:dmo"], "did you mean 'demo'?"),
        (["small.yaml", "--engine", "lokal"], "did you mean 'local'?"),
        (["small.yaml", "--set", "workers"], "not KEY=VALUE"),
        (["small.yaml", "--set", "wokers=2"], "did you mean 'workers'?"),
        (["small.yaml", "--track", "tensorbord"], "did you mean 'tensorboard'?"),
        (["small.yaml", "--runs", "small.yaml"], "can't be written to"),
        (["small.yaml", "--pack", "0"], "--pack 0"),
        (["small.yaml", "--threads", "0"], "--threads 0"),
    ],
)
def test_what_can_not_be_done_is_said_in_a_sentence_and_nothing_is_run(
    tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(DIGITS)
    assert main(["ablate", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.yaml"]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ([], {"threads": 1}),
        (["--threads", "2", "--workers", "3"], {"threads": 2, "workers": 3}),
        (["--device", "cuda"], {"threads": 1, "gpus": "all"}),
        (["--device", "cuda", "--set", "gpus=[1]", "--set", "per_gpu=2"], {"threads": 1, "gpus": [1], "per_gpu": 2}),
        (["--engine", "slurm", "--device", "cuda", "--set", "partition=gpu"], {"partition": "gpu"}),
    ],
)
def test_this_machine_is_told_of_threads_and_gpus(arguments, found):
    parser = argparse.ArgumentParser()
    add_ablate(parser.add_subparsers())
    assert ablate._engine_options(parser.parse_args(["ablate", "grid.yaml", *arguments])) == found


def test_a_task_of_ones_own_is_found_by_its_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("their_tasks.py").write_text(
        "from tests.ablation_toys import Toy\n\n\nclass Theirs(Toy):\n    name = 'theirs'\n"
    )
    theirs = Grid.of({**TOY, "task": {"name": "their_tasks:Theirs"}, "tune": None})
    results = theirs.run(tmp_path / "runs", engine="local", engine_options={"workers": 2})
    assert (results.runs["status"] == "done").all()
    with pytest.raises(GridError, match="can't be imported"):
        Grid.of({**TOY, "task": {"name": "their_taks:Theirs"}}).cells()


DRIVER = """
import sys
sys.path.insert(0, {root!r})
from tests import ablation_toys
from adapterzoo.ablation import Grid
print("begun", flush=True)
Grid.of({grid!r}).run({folder!r}, engine="local", engine_options={{"workers": 2}})
"""


def test_killed_twenty_times_at_random_nothing_is_lost_or_counted_twice(tmp_path, whole):
    # Odd times everything dies at once, even times the driver alone, whose processes have to notice.
    content = {**TOY, "task": {"name": "toy", "slow": 0.3}}
    text = DRIVER.format(root=str(ROOT), grid=content, folder=str(tmp_path))
    drawn = random.Random(6)
    before = {}
    for kill in range(20):
        driver = subprocess.Popen(
            [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert driver.stdout.readline() == b"begun\n"
        time.sleep(drawn.uniform(0.5, 5))
        (os.killpg if kill % 2 else os.kill)(driver.pid, signal.SIGKILL)
        driver.wait()
        driver.stdout.close()
        now = records(tmp_path)  # every record can be read
        assert before.items() <= now.items()  # and none that was there is lost or has changed
        before = now
    results = Grid.of(content).run(tmp_path, engine="local", engine_options={"workers": 2})
    assert (results.runs["status"] == "done").all()
    store = Store(tmp_path)
    planned = {
        run.id
        for record in records_of(read_grid(tmp_path))
        for run in [
            *(run for _, run in record.trials()),
            *(record.report(record.chosen(lambda run: store.result(run)["metrics"]), seed) for seed in record.seeds),
        ]
    }
    assert set(store.ended()) == planned
    assert len(planned) == RUNS
    assert not list(tmp_path.glob(".partial-*"))

    def gave(found):
        return sorted(
            (run["spec"], run["task"]["lr"], run["seed"], metrics["validation/accuracy"]) for run, metrics, *_ in found
        )

    assert gave(records(tmp_path).values()) == gave(records(whole).values())
