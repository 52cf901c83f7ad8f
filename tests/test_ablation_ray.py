"""The engine ray, on a cluster of this machine with two workers."""

import json
import os
import signal
import sys
import time

import pytest
import ray

from adapterzoo.ablation.engines import ray_cluster
from adapterzoo.ablation.engines.engine import Order
from adapterzoo.ablation.engines.making import make_engine
from adapterzoo.ablation.engines.ray_cluster import RayOptions, check_seen
from adapterzoo.errors import GridError, RunsError
from tests.engine_grids import carried_out
from tests.engine_runs import alive, until

PERFORM = {"perform": "tests.engine_runs:perform"}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc, which says who is alive, is Linux's")


@pytest.fixture(scope="module")
def cluster():
    """An engine that has begun a cluster of two workers; others of this module use that cluster, too."""
    engine = make_engine("ray", {"workers": 2, "max_retries": 1, **PERFORM})
    yield engine
    engine.close()
    assert not ray.is_initialized()


def ended(engine, number, seconds=240):
    found = {}
    deadline = time.monotonic() + seconds
    while len(found) < number:
        assert time.monotonic() < deadline, f"only {found} ended"
        found |= {item.key: item.problem for item in engine.wait(1.0)}
    return found


def told(path):
    return json.loads(until(lambda: path.exists() and path.read_text(), f"{path} to appear"))


def test_a_worker_that_is_killed_is_replaced_and_its_run_is_done(tmp_path, cluster):
    (tmp_path / "output").mkdir()
    payload = {"folder": str(tmp_path), "output": str(tmp_path / "output" / "killed.txt")}
    cluster.submit(
        Order("killed", {"do": "hang_once", "mark": str(tmp_path / "mark"), "tell": str(tmp_path / "1"), **payload})
    )
    cluster.submit(Order("beside", {"do": "raise", "tell": str(tmp_path / "2")}))
    process = int(until(lambda: (tmp_path / "mark").exists() and (tmp_path / "mark").read_text(), "the run to begin"))
    assert told(tmp_path / "1")["process"] == process
    os.kill(process, signal.SIGKILL)
    found = ended(cluster, 2)
    assert found == {"killed": None, "beside": "ValueError: the loss is not a number"}
    assert told(tmp_path / "1")["process"] != process, "the run was begun again elsewhere"
    beside = told(tmp_path / "2")["process"]
    until(lambda: not alive(beside), "the worker of the other run to end with it")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".partial-probe")] == []


def test_a_run_whose_workers_die_again_and_again_ends_in_a_sentence(tmp_path, cluster):
    output = tmp_path / "killed.txt"
    cluster.submit(Order("kill", {"do": "kill", "output": str(output)}))
    assert ended(cluster, 1) == {
        "kill": "its worker died, 2 times of 2; its last words: about to be killed | about to be killed"
    }
    assert output.read_text() == "about to be killed\n" * 2


def test_the_same_grid_gives_the_same_results_on_ray(tmp_path, cluster):
    other = make_engine("ray", {"workers": 2})
    expected = carried_out(tmp_path / "inline", make_engine("inline"))
    assert carried_out(tmp_path / "ray", other) == expected
    assert ray.is_initialized(), "an engine that found a cluster leaves it there"


def test_what_was_cancelled_does_not_run_on(tmp_path, cluster):
    other = make_engine("ray", {**PERFORM, "num_cpus": 0.5, "workers": 1})
    other.submit(Order("run", {"do": "hang", "tell": str(tmp_path / "told")}))
    process = told(tmp_path / "told")["process"]
    other.close()
    other.close()
    assert other.wait(0) == []
    until(lambda: not alive(process), "the run to die")


def test_capacity_is_what_the_cluster_has_room_for(cluster):
    assert cluster.capacity == 2
    assert make_engine("ray").capacity == 2
    assert make_engine("ray", {"num_cpus": 0.25}).capacity == 8
    assert make_engine("ray", {"num_cpus": 0.25, "workers": 5}).capacity == 5


def test_a_run_that_no_machine_has_room_for_is_refused(cluster):
    with pytest.raises(GridError, match=r"num_cpus=1 and num_gpus=0.5, and no machine .*\n  - .*: 2 CPU, 0 GPU"):
        make_engine("ray", {"num_gpus": 0.5})
    assert ray.is_initialized()
    assert make_engine("ray", {"num_gpus": 0.5, "workers": 3}).capacity == 3


def test_room_is_counted_by_machine():
    machines = [{"Resources": {"CPU": 7.0, "GPU": 2.0}}, {"Resources": {"CPU": 64.0}}, {"Resources": {}}]
    for options, expected in (({}, [7, 64, 0]), ({"num_cpus": 2}, [3, 32, 0]), ({"num_gpus": 0.1}, [7, 0, 0])):
        assert [ray_cluster._room(machine, RayOptions(**options)) for machine in machines] == expected


def test_machines_that_do_not_see_the_folder_are_named(tmp_path):
    looked = []

    def look(path):
        looked.append(os.path.exists(path))  # noqa: PTH110
        return {"one": True, "two": False, "three": False}

    with pytest.raises(RunsError, match=r"(?s)do not see .*\n  - two\n  - three"):
        check_seen(tmp_path, look)
    assert looked == [True]
    assert list(tmp_path.iterdir()) == []


def test_every_machine_is_asked_for_the_folder(tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(ray_cluster, "_SEEN_WITHIN", 0.0)
    (tmp_path / "there").touch()
    assert list(ray_cluster.look(str(tmp_path / "there")).values()) == [True]


def test_a_cluster_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(ray_cluster.ray, "is_initialized", lambda: False)

    def nowhere(**options):
        raise ConnectionError("Could not find any running Ray instance.\nmore")

    monkeypatch.setattr(ray_cluster.ray, "init", nowhere)
    with pytest.raises(GridError, match=r"no Ray cluster at auto: Could not find any running Ray instance\.$"):
        make_engine("ray", {"address": "auto"})
