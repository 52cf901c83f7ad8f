"""What watches runs: the environment record, trackers, the live display."""

import io
import json
import os
import re
import sys
import types
import warnings

import pytest
import torch
from rich.console import Console

from adapterzoo.ablation import Grid, Settings
from adapterzoo.ablation.driving.live import Display
from adapterzoo.ablation.runs.environment import differences, environment
from adapterzoo.ablation.runs.store import Store
from adapterzoo.ablation.trackers import tracker as trackers
from adapterzoo.ablation.trackers.tracker import TrackerWarning, Tracking, check_trackers, make_tracker
from adapterzoo.errors import CommandError
from tests.ablation_toys import Toy

RUN = {"id": "0123456789abcdef", "spec": "LoRA(r=2)", "task": {"name": "toy", "lr": 0.1}, "seed": 1}
CPU = torch.device("cpu")


# The environment record


def test_the_record_names_versions_machine_and_threads():
    found = environment(Toy(), CPU)
    assert found["packages"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["cpu"]["cores"] == os.cpu_count()
    assert (found["device"], found["gpus"]) == ("cpu", [])
    assert json.loads(json.dumps(found)) == found


def test_the_record_holds_no_variable_that_is_not_named(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = environment(Toy(), CPU)
    assert "a secret" not in json.dumps(found)
    assert found["variables"]["OMP_NUM_THREADS"] == "7"


def test_a_machine_that_tells_nothing_fails_no_run(monkeypatch):
    from adapterzoo.ablation.runs import environment as module

    def nothing(*_, **__):
        raise OSError("no such thing")

    for name in ("_said", "_cpu_model", "_usable"):
        monkeypatch.setattr(module, name, nothing)
    module._machine.cache_clear()
    found = module.environment(Toy(), CPU)
    module._machine.cache_clear()
    assert found["adapterzoo"] == {"commit": None, "dirty": None}
    assert found["cpu"]["model"] == ""


def test_records_that_can_not_be_compared_are_named():
    one = environment(Toy(), CPU)
    other = {**one, "packages": {**one["packages"], "torch": "1.0"}, "host": "another", "time": "later"}
    assert differences([one, one, other]) == [f'packages.torch: "{torch.__version__}" in 2 runs, "1.0" in 1 run']
    assert differences([one, {**one, "host": "another"}]) == []
    assert differences([]) == []


# Trackers


def tell(text):
    tracking = Tracking([text], "LoRA(r=2), seed 1", RUN)
    tracking.log(1, {"loss": 0.5})
    tracking.log(2, {"loss": 0.25, "validation/accuracy": 0.75})
    tracking.finish("done", {"test/accuracy": 0.9})


def test_tensorboard_has_every_point(tmp_path):
    tell(f"tensorboard:folder={tmp_path}")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / RUN["id"]))
    found.Reload()
    assert [(point.step, point.value) for point in found.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert found.Scalars("final/test/accuracy")[0].value == pytest.approx(0.9)


def test_mlflow_has_every_point(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MLflow's own, on its file store
        tell(f"mlflow:uri={tmp_path},experiment=mine")
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=str(tmp_path))
        [run] = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (run.info.run_name, run.info.status) == ("LoRA(r=2), seed 1", "FINISHED")
    assert (run.data.params["spec"], run.data.params["lr"]) == ("LoRA(r=2)", "0.1")
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(1, 0.5), (2, 0.25)]
    assert run.data.metrics["final/test/accuracy"] == 0.9


def test_wandb_is_told_what_it_takes(monkeypatch):
    # The real package starts a service of its own, seconds a run: its calls are recorded here instead.
    calls = []

    class Theirs:
        summary = types.SimpleNamespace(update=lambda values: calls.append(("summary", values)))

        def log(self, values, step):
            calls.append((step, values))

        def finish(self, exit_code):
            calls.append(("finish", exit_code))

    def init(**options):
        calls.append(("init", options))
        return Theirs()

    import wandb

    monkeypatch.setattr(wandb, "init", init)
    tell("wandb:project=mine,mode=offline")
    assert calls[0][1] == {
        "project": "mine", "mode": "offline", "dir": "runs", "id": RUN["id"], "name": "LoRA(r=2), seed 1",
        "config": RUN,
    }  # fmt: skip
    assert calls[1:] == [
        (1, {"loss": 0.5}), (2, {"loss": 0.25, "validation/accuracy": 0.75}), ("summary", {"test/accuracy": 0.9}),
        ("finish", 0),
    ]  # fmt: skip


class Broken:
    def __init__(self, at="log"):
        self.at, self.told = at, []

    def _do(self, what):
        self.told.append(what)
        if what == self.at:
            raise ConnectionError("no network")

    def start(self, label, run):
        self._do("start")

    def log(self, step, metrics):
        self._do("log")

    def finish(self, status, metrics):
        self._do("finish")


@pytest.mark.parametrize("at", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_dropped_once_and_the_run_goes_on(monkeypatch, at):
    made = []
    monkeypatch.setattr(trackers, "make_tracker", lambda text: made.append(Broken(at)) or made[-1])
    with pytest.warns(TrackerWarning, match="no network.*the run goes on") as caught:
        tell("broken")
    assert len(caught) == 1
    assert made[0].told[-1] == at


def test_tracking_changes_no_result(tmp_path):
    content = {"task": {"name": "toy"}, "grid": {"spec": ["LoRA(r=2)"], "seed": [1]}}
    for name, settings in (
        ("with", Settings(trackers=(f"tensorboard:folder={tmp_path}/tb",))),
        ("without", Settings()),
    ):
        Grid.of(content).run(tmp_path / name, engine="inline", settings=settings)
    [left], [right] = (list(Store(tmp_path / name).ended()) for name in ("with", "without"))
    assert left == right
    metrics = [Store(tmp_path / name).result(left)["metrics"] for name in ("with", "without")]
    assert metrics[0] == metrics[1]
    assert list((tmp_path / "tb" / left).iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensorbord", "did you mean 'tensorboard'?"),
        ("tensorboard:fodler=x", "did you mean 'folder'?"),
        ("tensorboard:folder", "'folder' is not OPTION=VALUE"),
    ],
)
def test_a_tracker_that_can_not_be_made_is_said_in_a_sentence(text, message):
    with pytest.raises(CommandError, match=re.escape(message)):
        make_tracker(text)


def test_a_missing_package_is_asked_for_before_anything_runs(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    with pytest.raises(CommandError, match=r'needs the package .wandb.*pip install "adapterzoo\[trackers\]"'):
        check_trackers(["wandb"])


# The live display


def display(width=80, terminal=False, **options):
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    return Display(slots=2, console=console, **options), console.file


def end(shown, number, role="report", status="done", metric=0.5, seconds=10.0, problem=None):
    shown.ended(str(number), f"cell {number}", role, status, metric, seconds, problem)


def test_where_there_is_no_terminal_every_run_is_a_plain_line():
    shown, file = display()
    with shown:
        shown.stage("preparing the task")
        shown.expect(10, 3)
        shown.started("1", "cell 1", "tune")
        end(shown, 1, "tune")
        end(shown, 2, status="failed", metric=None, problem="ValueError: no")
    assert file.getvalue().splitlines() == [
        "preparing the task",
        "10 runs, 3 of them done before",
        "[4/10] cell 1: done in 10 s, validation 50.0 %; about 30 s left",
        "[5/10] failed: cell 2: ValueError: no",
    ]


def test_a_long_name_in_a_narrow_place_stays_on_its_line():
    shown, file = display(width=30)
    with shown:
        shown.expect(1, 0)
        shown.ended("1", "x" * 200, "tune", "done", None, 1.0, None)
    assert "x" * 200 in file.getvalue().splitlines()[1]


def test_in_a_terminal_counts_the_best_and_what_runs_are_shown():
    shown, _file = display(width=120, terminal=True)
    with shown:
        shown.expect(20, 0)
        for number in range(12):
            shown.started(str(number), f"cell {number}", "tune")
        end(shown, 0, "tune", metric=0.25)
        end(shown, 1, "tune", metric=0.75)
        text = _text(shown)
    assert "2 of 20 runs, 10 running, 0 failed" in text
    assert "best on validation so far: 75.0 %, cell 1" in text
    assert "cell 2\n" in text
    assert "and 2 more" in text
    assert "cell 11" not in text


def test_less_may_be_better():
    shown, _ = display(terminal=True, maximise=False, percent=False)
    with shown:
        shown.expect(2, 0)
        end(shown, 0, metric=2.0)
        end(shown, 1, metric=1.0)
        assert "so far: 1, cell 1" in _text(shown)


def _text(shown):
    console = Console(file=io.StringIO(), width=120)
    console.print(shown._table())
    return console.file.getvalue()


def test_ten_thousand_runs_leave_no_more_behind_than_a_few_hundred():
    shown, _ = display(terminal=True)
    with shown:
        shown.expect(10_000, 0)
        for number in range(10_000):
            shown.started(str(number), "cell", "tune")
            end(shown, number, "tune")
    kept = [value for value in vars(shown).values() if hasattr(value, "__len__") and not isinstance(value, str)]
    assert max(len(value) for value in kept) < 10
    assert max(len(times) for times in shown._seconds.values()) <= 200
