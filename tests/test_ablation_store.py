"""Runs as directories: whole or not there, whatever happens while they are written."""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from adapterzoo.ablation.runs import store as store_module
from adapterzoo.ablation.runs.folder import driving, read_grid, write_grid
from adapterzoo.ablation.runs.identity import RunSpec, code_version, digest_of
from adapterzoo.ablation.runs.store import Store
from adapterzoo.ablation.tasks.task import Outcome, columns
from adapterzoo.errors import RunsError
from tests.ablation_toys import Toy

SPEC = RunSpec(spec="LoRA(r=2)", task={"name": "toy"}, seed=1, test=True, data="d", code="c")
OUTCOME = Outcome({"test/accuracy": 0.5, "strange": float("nan")}, columns(id=[1, 2], score=torch.tensor([0.0, 1.0])))


def seen(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "change",
    [{"spec": None}, {"task": {"name": "toy", "lr": 1}}, {"seed": 2}, {"test": False}, {"data": "e"}, {"code": "b"}],
)
def test_every_part_of_its_content_makes_a_run_another_one(change):
    assert SPEC.model_copy(update=change).id != SPEC.id
    assert SPEC.model_copy().id == SPEC.id
    assert len(SPEC.id) == 16


def test_the_order_of_options_makes_no_other_run():
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})


def test_the_code_of_a_run_names_torch_this_package_and_the_task():
    version = code_version(Toy())
    assert torch.__version__ in version
    assert version.count(",") == 2


def test_a_run_appears_whole_when_it_has_ended_and_not_before(tmp_path):
    store = Store(tmp_path)
    attempt = store.begin(SPEC)
    attempt.log(1, {"loss": 0.5, "bad": float("inf")})
    attempt.log(2, {"loss": torch.tensor(0.25)})
    assert store.status(SPEC.id) is None
    assert list(store.ended()) == []
    assert attempt.finish(OUTCOME, 1.5)
    assert store.status(SPEC.id) == "done"
    assert list(store.ended()) == [SPEC.id]
    place = tmp_path / SPEC.id
    assert seen(place) == ["examples.npz", "metrics.jsonl", "result.json", "run.json"]
    assert store.result(SPEC.id) == {
        "status": "done", "metrics": {"test/accuracy": 0.5, "strange": None}, "seconds": 1.5,
    }  # fmt: skip
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5, "bad": None}, {"step": 2, "loss": 0.25}]
    with np.load(place / "examples.npz") as found:
        assert found["id"].tolist() == [1, 2]
        assert found["score"].tolist() == [0.0, 1.0]
    assert RunSpec.model_validate_json((place / "run.json").read_text()) == SPEC


def test_a_failed_run_keeps_its_traceback_and_can_be_forgotten(tmp_path):
    store = Store(tmp_path)
    try:
        raise ValueError("no such thing")
    except ValueError as error:
        store.begin(SPEC).fail(error, 0.1)
    found = store.result(SPEC.id)
    assert found["status"] == "failed"
    assert found["error"]["type"] == "ValueError"
    assert "test_ablation_store.py" in found["error"]["traceback"]
    store.forget(SPEC.id)
    assert store.status(SPEC.id) is None
    assert seen(tmp_path) == []
    assert store.begin(SPEC).finish(OUTCOME, 1.0)
    assert store.status(SPEC.id) == "done"


def test_of_two_processes_that_do_one_run_one_counts(tmp_path):
    store = Store(tmp_path)
    attempts = [store.begin(SPEC) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        counted = list(pool.map(lambda attempt: attempt.finish(OUTCOME, 1.0), attempts))
    assert sorted(counted) == [False] * 7 + [True]
    assert seen(tmp_path) == [SPEC.id]


@pytest.mark.parametrize("name", ["rename", "write_text", "fsync", "savez_compressed"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_leaves_no_record(tmp_path, monkeypatch, name, number):
    store = Store(tmp_path)
    attempt = store.begin(SPEC)
    owner = {"rename": Path, "write_text": Path, "fsync": os, "savez_compressed": np}[name]

    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(OSError, match=os.strerror(number)):
            attempt.finish(OUTCOME, 1.0)
        assert store.status(SPEC.id) is None
    assert store.sweep() == 1
    assert seen(tmp_path) == []


def test_a_directory_without_a_record_is_named_and_not_guessed_at(tmp_path):
    (tmp_path / SPEC.id).mkdir()
    with pytest.raises(RunsError, match=f"{SPEC.id} has no result.json; remove that directory"):
        Store(tmp_path).result(SPEC.id)
    (tmp_path / SPEC.id / "result.json").write_text('{"status": "do')
    with pytest.raises(RunsError, match="can't be read"):
        Store(tmp_path).result(SPEC.id)
    (tmp_path / SPEC.id / "result.json").write_text("[]")
    with pytest.raises(RunsError, match="no record of a run"):
        Store(tmp_path).result(SPEC.id)


def test_a_full_disk_is_said_in_words(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.Path, "write_bytes", full)
    with pytest.raises(RunsError, match=r"no room is left.*Make room, and give the same command again"):
        Store(tmp_path).check_writable()
    assert seen(tmp_path) == []


def test_a_folder_that_can_not_be_written_to_is_said_in_words(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunsError, match="can't be written to"):
        Store(tmp_path / "file").check_writable()
    with pytest.raises(RunsError, match="can't be written to"), driving(tmp_path / "file"):
        pass


def test_a_folder_has_one_driver_at_a_time(tmp_path):
    with (
        driving(tmp_path),
        pytest.raises(RunsError, match=rf"another driver is at work on .*process {os.getpid()} on"),
        driving(tmp_path),
    ):
        pass
    with driving(tmp_path):
        pass


def record(**parts):
    cell = {"task": {"name": "toy"}, "data": "d", "code": "c"}
    grid = {"task": {"name": "toy"}, "tune": None, "grid": [1], **parts.pop("grid", {})}
    return {"format": 1, "grid": grid, "cells": [{**cell, **parts}]}


def test_a_grid_may_grow_in_its_folder(tmp_path):
    write_grid(tmp_path, record())
    write_grid(tmp_path, record(grid={"grid": [1, 2]}))
    assert read_grid(tmp_path)["grid"]["grid"] == [1, 2]
    assert seen(tmp_path) == ["grid.json"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"grid": {"task": {"name": "other"}}}, 'task: {"name": "toy"} there, {"name": "other"} now'),
        ({"grid": {"tune": {"trials": 3}}}, "tune: null there"),
        ({"data": "new"}, "data: d there, new now"),
        ({"code": "new"}, "code: c there, new now"),
    ],
)
def test_runs_of_another_task_search_data_or_code_are_not_mixed(tmp_path, parts, message):
    write_grid(tmp_path, record())
    with pytest.raises(RunsError, match="another grid or version") as caught:
        write_grid(tmp_path, record(**parts))
    assert message in str(caught.value)
    assert read_grid(tmp_path) == record()


def test_what_is_no_folder_of_runs_is_said_in_words(tmp_path):
    with pytest.raises(RunsError, match="does not exist"):
        read_grid(tmp_path / "nowhere")
    with pytest.raises(RunsError, match=r"has no grid\.json"):
        read_grid(tmp_path)
    (tmp_path / "grid.json").write_text('{"format": 7}')
    with pytest.raises(RunsError, match="format 7; this version of adapterzoo reads format 1"):
        read_grid(tmp_path)
