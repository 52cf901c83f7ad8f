"""The engine slurm: on submitit's own stand-ins, and on commands that pretend to be Slurm's."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

from adapterzoo.ablation.engines import slurm
from adapterzoo.ablation.engines.engine import Order
from adapterzoo.ablation.engines.jobs import Job
from adapterzoo.ablation.engines.making import make_engine
from adapterzoo.errors import GridError, RunsError
from tests.engine_grids import carried_out
from tests.engine_runs import alive, until
from tests.fake_slurm import install

PERFORM = {"perform": "tests.engine_runs:perform"}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-ins and /proc are Linux's")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with Slurm's commands on the path, and with what they have done."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    install(folder)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "_LOOK", 0.05)
    monkeypatch.setattr(SlurmJob, "watcher", SlurmInfoWatcher())  # it remembers the jobs of other clusters
    return folder


def ended(engine, number, seconds=180):
    found = {}
    deadline = time.monotonic() + seconds
    while len(found) < number:
        assert time.monotonic() < deadline, f"only {found} ended"
        found |= {item.key: item.problem for item in engine.wait(0.5)}
    return found


def orders(engine, folder, ways, **more):
    """Submit orders, each with files of its own."""
    (folder / "output").mkdir(exist_ok=True)
    for way in ways:
        files = {name: str(folder / f"{way}.{name}") for name in ("tell", "go", "mark")}
        output = {"folder": str(folder), "output": str(folder / "output" / way)}
        engine.submit(Order(way, {"do": way, **files, **output, **more}))


def told(folder, way):
    path = folder / f"{way}.tell"
    return json.loads(until(lambda: path.exists() and path.read_text(), f"{path} to appear"))


def calls(cluster, name):
    return [line for line in (cluster / "calls").read_text().splitlines() if line.startswith(name)]


def test_orders_become_one_array_and_each_job_ends_in_a_sentence(tmp_path, cluster):
    engine = make_engine(
        "slurm", {"partition": "long", "array_parallelism": 2, "timeout_min": 7, "poll": 0.2, "grace": 0.2, **PERFORM}
    )
    orders(engine, tmp_path, ["nothing", "raise", "kill"])
    assert ended(engine, 3) == {
        "nothing": None,
        "raise": "ValueError: the loss is not a number",
        "kill": "job 1_2 ended as FAILED before it was done; its last words: about to be killed",
    }
    assert len(calls(cluster, "sbatch")) == 1
    script = (cluster / "1.script").read_text()
    for line in ("--array=0-2%2", "--partition=long", "--time=7", "--job-name=adapterzoo"):
        assert f"#SBATCH {line}" in script
    left = {path.name for path in (tmp_path / "submitit").iterdir()}
    assert not any(name.startswith("1_0_") for name in left), "files of a job that is done are removed"
    assert any(name.startswith("1_2_") for name in left)
    engine.close()


def test_a_preempted_job_is_requeued_and_begins_again(tmp_path, cluster):
    engine = make_engine("slurm", PERFORM)
    orders(engine, tmp_path, ["hang"])
    engine.wait(0)
    first = told(tmp_path, "hang")
    (tmp_path / "hang.tell").unlink()
    (tmp_path / "hang.go").touch()
    os.kill(first["process"], signal.SIGSTOP)  # so that it sees the signal before it sees the file
    os.kill(first["process"], signal.SIGUSR2)
    os.kill(first["process"], signal.SIGCONT)
    assert ended(engine, 1) == {"hang": None}
    assert told(tmp_path, "hang")["process"] != first["process"]
    assert calls(cluster, "scontrol") == ["scontrol requeue 1"]
    engine.close()


def test_a_job_that_the_scheduler_does_not_know_is_lost_and_the_scheduler_is_spared(tmp_path, cluster):
    (cluster / "forgetful").touch()
    engine = make_engine("slurm", {"poll": 0.5, "lost_after": 3.0, **PERFORM})
    before = len(calls(cluster, "sacct"))
    orders(engine, tmp_path, ["hang"])
    start = time.monotonic()
    [(_, problem)] = ended(engine, 1).items()
    seconds = time.monotonic() - start
    assert problem.startswith("job 1 is lost: for 3 s it has been UNKNOWN")
    assert 2 <= len(calls(cluster, "sacct")) - before <= seconds / 0.5 + 2
    assert calls(cluster, "scancel") == ["scancel 1"], "should it be there after all, it is not to run on"
    engine.close()


def test_without_accounting_nothing_begins(cluster):
    (cluster / "no accounting").touch()
    with pytest.raises(GridError, match=r"sacct does not answer \(Slurm accounting storage is disabled\)"):
        make_engine("slurm")


def test_closing_cancels_every_job(tmp_path, cluster):
    engine = make_engine("slurm", PERFORM)
    orders(engine, tmp_path, ["hang"])
    engine.wait(0)
    process = told(tmp_path, "hang")["process"]
    engine.close()
    engine.close()
    assert calls(cluster, "scancel") == ["scancel 1"]
    until(lambda: not alive(process), "the job to die")
    assert engine.wait(0) == []


def test_a_scheduler_that_refuses_is_asked_again_and_in_the_end_believed(tmp_path, cluster):
    engine = make_engine("slurm", {"gather": 0.01, "cluster": "slurm", **PERFORM})
    (cluster / "refusals").write_text("2")
    orders(engine, tmp_path, ["nothing"])
    assert ended(engine, 1) == {"nothing": None}
    assert len(calls(cluster, "sbatch")) == 3
    (cluster / "refusals").write_text("100")
    orders(engine, tmp_path, ["raise"])
    with pytest.raises(RunsError, match=r"Slurm did not take 1 job, asked 6 times: .*temporarily unable"):
        ended(engine, 1)
    assert len(calls(cluster, "sbatch")) == 9
    engine.close()


def test_without_slurm_the_engine_says_so_and_names_what_works_here(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GridError, match=r"Could not detect \"srun\".*cluster=local tries the same grid"):
        make_engine("slurm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partiton": "a", "pol": 3}, r"(?s)no option 'partiton'; did you mean 'partition'.*no option 'pol'"),
        ({"poll": -1.0}, "poll = -1.0: Input should be greater than 0"),
        ({"cluster": "lsf"}, "cluster = 'lsf'"),
        ({"cluster": "local", "timeout_min": "long"}, 'Parameter "timeout_min" expected type'),
    ],
)
def test_options_that_can_not_be_are_said(options, message):
    with pytest.raises(GridError, match=message):
        make_engine("slurm", options)


def test_slurms_options_go_with_and_without_their_prefix_and_ours_stay_here():
    options = slurm.SlurmOptions(partition="a", slurm_qos="b", mem_gb=3, workers=7, parameters={"gpus_per_node": 1})
    expected = {"slurm_partition": "a", "slurm_qos": "b", "mem_gb": 3, "gpus_per_node": 1}
    assert (options.workers, options.parameters) == (7, expected)


def test_on_submitits_local_executor_jobs_run_are_requeued_and_lost_ones_are_told(tmp_path):
    engine = make_engine("slurm", {"cluster": "local", **PERFORM})
    orders(engine, tmp_path, ["hang", "kill"])
    engine.wait(0)
    first = told(tmp_path, "hang")
    (tmp_path / "hang.tell").unlink()
    (tmp_path / "hang.go").touch()
    for number in (signal.SIGSTOP, signal.SIGUSR2, signal.SIGCONT):
        os.kill(first["process"], number)
    found = ended(engine, 2)
    assert found["hang"] is None
    assert told(tmp_path, "hang")["process"] != first["process"]
    assert "ended as FINISHED before it was done; its last words: about to be killed" in found["kill"]
    engine.close()


def test_closing_ends_the_jobs_of_the_local_executor(tmp_path):
    engine = make_engine("slurm", {"cluster": "local", **PERFORM})
    orders(engine, tmp_path, ["hang"])
    engine.wait(0)
    process = told(tmp_path, "hang")["process"]
    engine.close()
    until(lambda: not alive(process), "the job to die")


def test_jobs_of_a_driver_in_the_background_which_ignores_interrupts_end_too(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        engine = make_engine("slurm", {"cluster": "local", **PERFORM})
        orders(engine, tmp_path, ["hang"])
        engine.wait(0)
        process = told(tmp_path, "hang")["process"]
        engine.close()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    until(lambda: not alive(process), "the job to die")


# submitit's debug executor leaves the log files of its jobs to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_debug_executor_does_orders_in_this_process(tmp_path):
    engine = make_engine("slurm", {"cluster": "debug", **PERFORM})
    orders(engine, tmp_path, ["nothing", "raise"])
    assert ended(engine, 2) == {"nothing": None, "raise": "ValueError: the loss is not a number"}
    assert told(tmp_path, "nothing")["process"] == os.getpid()
    engine.close()


def test_the_same_grid_gives_the_same_results_as_jobs(tmp_path):
    expected = carried_out(tmp_path / "inline", make_engine("inline"))
    assert carried_out(tmp_path / "slurm", make_engine("slurm", {"cluster": "local"})) == expected


def test_what_the_scheduler_says_of_a_job_is_not_believed_at_once(tmp_path):
    paths = SimpleNamespace(stderr=Path(tmp_path / "none"))
    job = Job(Order("one", {}), SimpleNamespace(job_id="7", paths=paths))

    def judge(now, state, finished):
        return job.judge(now, state, finished, lost_after=100.0, grace=10.0)

    assert [judge(0, "RUNNING", False), judge(1, "NODE_FAIL", True), judge(10, "REQUEUED", False)] == [None] * 3
    assert [judge(20, "PREEMPTED", False), judge(119, "UNKNOWN", False), judge(125, "RUNNING", False)] == [None] * 3
    assert judge(200, "UNKNOWN", False) is None
    assert judge(300, "UNKNOWN", False) == "job 7 is lost: for 100 s it has been UNKNOWN"
    assert judge(310, "OUT_OF_MEMORY", True) is None
    assert judge(320, "OUT_OF_MEMORY", True) == "job 7 ended as OUT_OF_MEMORY before it was done"
