"""The driver: what it submits, in which order, and what it makes of how runs end."""

import errno
from collections import Counter
from pathlib import Path

import pytest

from adapterzoo.ablation.driving.orders import Settings
from adapterzoo.ablation.driving.session import carry_out, plan
from adapterzoo.ablation.engines.engine import Ended
from adapterzoo.ablation.grids.outline import Outline
from adapterzoo.ablation.runs.folder import driving, read_grid, records_of
from adapterzoo.ablation.runs.identity import RunSpec
from adapterzoo.ablation.runs.store import Store
from adapterzoo.ablation.tasks.task import Outcome
from adapterzoo.errors import GridError, RunsError
from tests import ablation_toys  # noqa: F401  (registers the task "toy")

GRID = {
    "task": {"name": "toy"},
    "grid": {"spec": ["LoRA(r=2)"], "wrap": ["{spec}", "MAP({spec})"], "seed": {"count": 3}},
    "tune": {"lr": [1e-3, 1e-2]},
}


class Scripted:
    """An engine that does what a test says: `script` maps a run's spec text to what becomes of it."""

    name = "inline"

    def __init__(self, capacity=2, script=lambda run: {"validation/accuracy": 0.5}, stop_after=None):
        self.capacity = capacity
        self.orders, self.closed, self._script, self._waiting, self._left = [], False, script, [], stop_after

    def submit(self, order):
        assert len(self._waiting) < self.capacity or order.payload["what"] == "prepare"
        self.orders.append(order)
        self._waiting.append(order)

    def wait(self, timeout):
        order = self._waiting.pop(0)
        if order.payload["what"] == "prepare":
            Path(order.payload["into"]).mkdir(parents=True)
            return [Ended(order.key)]
        if self._left == 0:
            raise KeyboardInterrupt
        self._left = None if self._left is None else self._left - 1
        for content in order.payload["runs"]:
            run = RunSpec.model_validate(content)
            made = self._script(run)
            if isinstance(made, Ended):  # a process that dies takes with it what it has not ended yet
                return [Ended(order.key, made.problem)]
            attempt = Store(Path(order.payload["folder"])).begin(run)
            attempt.fail(made, 0.1) if isinstance(made, Exception) else attempt.finish(Outcome(made), 0.1)
        return [Ended(order.key)]

    def close(self):
        self.closed = True

    def runs(self):
        return [RunSpec.model_validate(run) for order in self.orders for run in order.payload.get("runs", ())]


class Heard:
    """A listener that remembers."""

    def __init__(self):
        self.events = []

    def __getattr__(self, name):
        return lambda *values: self.events.append((name, *values))


def drive(folder, engine, grid=GRID, **settings):
    heard = Heard()
    tally = carry_out(plan(Outline.of(grid)), folder, engine, heard, Settings(**settings))
    assert engine.closed
    return tally, heard


def test_every_cell_is_tuned_and_its_best_point_is_reported(tmp_path):
    def quality(run):
        better = 1e-2 if run.spec.startswith("MAP") else 1e-3
        return {"validation/accuracy": 0.9 if run.task["lr"] == better else 0.1}

    engine = Scripted(script=quality)
    tally, _ = drive(tmp_path, engine)
    assert (tally.done, tally.failed, tally.found) == (2 * 2 + 2 * 3, 0, 0)
    reported = {(run.spec.split("(")[0], run.task["lr"], run.seed) for run in engine.runs() if run.test}
    assert reported == {(name, lr, seed) for name, lr in (("LoRA", 1e-3), ("MAP", 1e-2)) for seed in range(3)}
    assert {run.seed for run in engine.runs() if not run.test} == {1000}


def test_the_task_is_prepared_once_and_before_any_run(tmp_path):
    engine = Scripted()
    drive(tmp_path, engine)
    what = [order.payload["what"] for order in engine.orders]
    assert what[0] == "prepare"
    assert Counter(what) == {"prepare": 1, "run": 10}


def test_reports_come_seed_by_seed_so_that_cells_lack_the_same_seeds(tmp_path):
    engine = Scripted(capacity=1)
    drive(tmp_path, engine)
    seeds = [run.seed for run in engine.runs() if run.test]
    assert seeds == sorted(seeds)


@pytest.mark.parametrize("after", range(11))
def test_an_interrupted_grid_goes_on_and_does_nothing_twice(tmp_path, after):
    first = Scripted(stop_after=after)
    with pytest.raises(KeyboardInterrupt):
        drive(tmp_path, first) if after < 10 else interrupt_at_the_end(tmp_path, first)
    assert first.closed
    finished = set(Store(tmp_path).ended())
    assert len(finished) == after
    second = Scripted()
    tally, _ = drive(tmp_path, second)
    assert (tally.done, tally.found) == (10 - after, after)
    assert not finished & {run.id for run in second.runs()}
    assert len(set(Store(tmp_path).ended())) == 10


def interrupt_at_the_end(folder, engine):
    drive(folder, engine)
    raise KeyboardInterrupt


def test_a_larger_grid_in_the_same_folder_runs_only_what_is_new(tmp_path):
    drive(tmp_path, Scripted())
    larger = {**GRID, "grid": {**GRID["grid"], "wrap": ["{spec}", "MAP({spec})", "DoRA({spec})"]}}
    engine = Scripted()
    tally, _ = drive(tmp_path, engine, larger)
    assert (tally.done, tally.found) == (5, 10)
    assert {run.spec.split("(")[0] for run in engine.runs()} == {"DoRA"}


def test_failed_runs_are_kept_and_done_again_on_demand(tmp_path):
    def fails(run):
        return ValueError("no") if run.test and run.seed == 1 else {"validation/accuracy": 0.5}

    tally, heard = drive(tmp_path, Scripted(script=fails))
    assert (tally.done, tally.failed) == (8, 2)
    assert [event[-1] for event in heard.events if event[0] == "ended" and event[4] == "failed"] == [
        "ValueError: no"
    ] * 2
    again = Scripted()
    assert drive(tmp_path, again)[0].found == 10
    assert again.runs() == []
    tally, _ = drive(tmp_path, Scripted(), retry_failed=True)
    assert (tally.done, tally.failed, tally.found) == (2, 0, 8)


def test_a_process_that_dies_is_a_failed_run_with_its_reason(tmp_path):
    def dies(run):
        return Ended("", "killed by signal 9 (SIGKILL)") if run.test else {"validation/accuracy": 0.5}

    tally, _ = drive(tmp_path, Scripted(script=dies))
    assert tally.failed == 6
    store = Store(tmp_path)
    messages = {store.result(run)["error"]["message"] for run in store.ended() if store.status(run) == "failed"}
    assert messages == {"killed by signal 9 (SIGKILL)"}


def test_a_cell_whose_search_failed_altogether_is_named_and_not_reported(tmp_path):
    def fails(run):
        return ValueError("no") if run.spec.startswith("MAP") else {"validation/accuracy": 0.5}

    engine = Scripted(script=fails)
    tally, _ = drive(tmp_path, engine)
    assert tally.unfinished == ["MAP(LoRA(r=2)): no point of its search was run to its end"]
    assert not any(run.test and run.spec.startswith("MAP") for run in engine.runs())


def test_a_point_of_a_search_that_failed_is_not_chosen(tmp_path):
    def fails(run):
        return ValueError("no") if run.task["lr"] == 1e-2 else {"validation/accuracy": 0.1}

    engine = Scripted(script=fails)
    drive(tmp_path, engine)
    assert {run.task["lr"] for run in engine.runs() if run.test} == {1e-3}


def test_a_full_disk_stops_the_driver_with_a_sentence(tmp_path, monkeypatch):
    class Full(Scripted):
        def wait(self, timeout):
            found = super().wait(timeout)
            if self.orders[-1].payload["what"] == "run":

                def full(*_):
                    raise OSError(errno.ENOSPC, "No space left on device")

                monkeypatch.setattr(Path, "write_bytes", full)
            return found

    engine = Full(script=lambda run: Ended("", "exit code 1"))
    with pytest.raises(RunsError, match="no room is left"):
        drive(tmp_path, engine)
    assert engine.closed
    assert list(Store(tmp_path).ended()) == []


def test_a_task_that_can_not_be_prepared_stops_the_driver(tmp_path):
    class Unprepared(Scripted):
        def wait(self, timeout):
            return [Ended(self._waiting.pop(0).key, "exit code 1")]

    with pytest.raises(RunsError, match=r"could not be prepared: exit code 1"):
        drive(tmp_path, Unprepared())


def test_two_drivers_never_share_a_folder(tmp_path):
    engine = Scripted()
    with driving(tmp_path), pytest.raises(RunsError, match="another driver is at work"):
        drive(tmp_path, engine)
    assert engine.closed
    assert engine.orders == []


def test_the_plan_in_the_folder_is_the_plan_that_was_carried_out(tmp_path):
    engine = Scripted(script=lambda run: {"validation/accuracy": run.task["lr"]})
    drive(tmp_path, engine)
    store = Store(tmp_path)
    for record in records_of(read_grid(tmp_path)):
        point = record.chosen(lambda run: store.result(run)["metrics"])
        assert point == {"lr": 1e-2}
        assert all(store.status(record.report(point, seed).id) == "done" for seed in record.seeds)


def test_too_few_seeds_are_said_before_anything_runs():
    warnings = plan(Outline.of(GRID)).warnings()
    assert any("n too small" in sentence or "too few" in sentence for sentence in warnings)
    enough = {**GRID, "grid": {**GRID["grid"], "seed": {"count": 8}}}
    assert plan(Outline.of(enough)).warnings() == []


def test_a_grid_without_the_bare_generator_says_what_it_can_not_tell():
    alone = {**GRID, "grid": {**GRID["grid"], "wrap": ["MAP({spec})"]}}
    assert "no bare generator" in plan(Outline.of(alone)).warnings()[0]


def test_cells_that_adapt_fewer_layers_are_named_before_anything_runs():
    grid = {"task": {"name": "digits"}, "grid": {"spec": ["LoRA(r=2)", "OFT(LoRA(r=2))"], "seed": {"count": 3}}}
    told = "fewer layers than the others, since some do not fit: OFT(LoRA(r=2)) (12 of 13)"
    assert told in plan(Outline.of(grid)).warnings()


def test_nothing_runs_when_a_cell_can_not_work():
    with pytest.raises(GridError, match="1 of 2 cells can't work, and nothing was run"):
        plan(Outline.of({**GRID, "grid": {"spec": ["LoRA(r=2)", "FLoRA(r=50)"]}}))


def test_runs_that_may_share_a_process_do_up_to_the_number_asked_for(tmp_path):
    engine = Scripted()
    tally, _ = drive(tmp_path, engine, pack=3)
    sizes = [len(order.payload["runs"]) for order in engine.orders if order.payload["what"] == "run"]
    assert tally.done == 10
    assert max(sizes) == 3
    assert len(sizes) < 10
    for order in engine.orders:
        assert len({run["test"] for run in order.payload.get("runs", ({"test": 0},))}) == 1
    assert len({run.id for run in engine.runs()}) == 10


def test_runs_of_a_shared_process_that_died_are_done_again_each_in_its_own(tmp_path):
    def dies(run):
        if run.spec.startswith("MAP") and run.seed == 1:
            return Ended("", "killed by signal 11 (SIGSEGV)")
        return {"validation/accuracy": 0.5}

    engine = Scripted(script=dies)
    tally, _ = drive(tmp_path, engine, pack=4)
    assert (tally.done, tally.failed) == (9, 1)
    store = Store(tmp_path)
    [failed] = [run for run in store.ended() if store.status(run) == "failed"]
    assert store.result(failed)["error"]["message"] == "killed by signal 11 (SIGSEGV)"


def test_a_worker_with_other_code_stops_the_driver_and_spoils_no_run(tmp_path):
    engine = Scripted(script=lambda run: Ended("", "RunsError: this worker has other code: torch 1.0"))
    with pytest.raises(RunsError, match=r"this worker has other code: torch 1\.0"):
        drive(tmp_path, engine)
    assert list(Store(tmp_path).ended()) == []


def test_a_run_that_found_no_room_stops_the_driver_and_is_no_failure(tmp_path):
    engine = Scripted(script=lambda run: Ended("", "OSError: [Errno 28] No space left on device: 'result.json'"))
    with pytest.raises(RunsError, match="no room is left"):
        drive(tmp_path, engine)
    assert list(Store(tmp_path).ended()) == []


def test_what_killed_preparations_left_is_swept_away(tmp_path):
    drive(tmp_path, Scripted())
    left = tmp_path / "prepared" / ".partial-0123-4567"
    left.mkdir()
    drive(tmp_path, Scripted())
    assert not left.exists()
