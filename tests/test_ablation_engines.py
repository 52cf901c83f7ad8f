"""The engines inline and local: every way that a run can end, and that nothing outlives anything."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from adapterzoo.ablation.engines import child as child_module
from adapterzoo.ablation.engines import making
from adapterzoo.ablation.engines.endings import ending, last_words
from adapterzoo.ablation.engines.engine import Order
from adapterzoo.ablation.engines.making import ENGINES, make_engine
from adapterzoo.errors import GridError, MissingPackageError, RunsError
from tests.engine_grids import carried_out
from tests.engine_runs import alive, until

REPO = Path(__file__).parent.parent
HERE = {"perform": "tests.engine_runs:perform", "warm": "tests.engine_runs:warm"}
linux = pytest.mark.skipif(sys.platform != "linux", reason="forking is tried on Linux, and /proc says who is alive")


def local(**options):
    return make_engine("local", {"workers": 2, **HERE, **options})


@pytest.fixture(scope="module")
def shared():
    """An engine whose server has started."""
    engine = local()
    yield engine
    engine.close()


def ended(engine, number, seconds=120):
    """The problems of the next orders that end, by key."""
    found = {}
    deadline = time.monotonic() + seconds
    while len(found) < number:
        assert time.monotonic() < deadline, f"only {found} ended"
        for item in engine.wait(1.0):
            assert item.key not in found
            found[item.key] = item.problem
    return found


def do(engine, key, **payload):
    engine.submit(Order(key, payload))
    return ended(engine, 1)[key]


def told(path):
    """What a run has told of itself."""
    return json.loads(until(lambda: path.exists() and path.read_text(), f"{path} to appear"))


ENDS = {
    "nothing": None,
    "backward": None,
    "raise": "ValueError: the loss is not a number",
    "sys_exit": "left by sys.exit(3) before it was done",
    "os_exit": "ended with exit code 4 before it was done (os._exit?)",
    "kill": "killed by signal 9 (SIGKILL); out of memory?; its last words: about to be killed",
    "segfault": "killed by signal 11 (SIGSEGV); its last words: Fatal Python error: Segmentation fault",
}


def test_each_run_ends_alone_and_in_a_sentence(tmp_path, shared):
    for way in ENDS:
        shared.submit(Order(way, {"do": way, "output": str(tmp_path / way)}))
    found = ended(shared, len(ENDS))
    assert "in _segfault" in found["segfault"]
    found["segfault"] = found["segfault"][: len(ENDS["segfault"])]
    assert found == ENDS


def test_leaving_with_exit_code_0_is_not_mistaken_for_having_done_it(shared):
    assert do(shared, "zero", do="os_exit", code=0) == "ended with exit code 0 before it was done (os._exit?)"


@linux
def test_what_a_run_prints_goes_to_its_file(tmp_path, shared, capfd):
    output = tmp_path / "printed.txt"
    output.write_text("before\n")
    assert do(shared, "speaks", do="speak", output=str(output)) is None
    assert sorted(output.read_text().splitlines()) == [
        "before",
        "past Python",
        "to standard error",
        "to standard output",
    ]
    assert do(shared, "speaks again", do="speak") is None
    assert capfd.readouterr() == ("", "")


def test_a_file_that_can_not_be_written_is_the_runs_problem(tmp_path, shared):
    missing = str(tmp_path / "nowhere" / "printed.txt")
    assert "its output can't be written" in do(shared, "mute", output=missing, warm={"data": "A"})
    with_new = local(fresh=True, workers=1)
    assert "could not be started" in do(with_new, "mute", output=missing)
    with_new.close()


@linux
def test_data_are_loaded_once_before_the_fork(tmp_path, shared):
    for number, data in enumerate("PPQP"):
        assert do(shared, str(number), tell=str(tmp_path / str(number)), warm={"data": data}) is None
    found = [told(tmp_path / str(number)) for number in range(4)]
    loaded = ["".join(about["loaded"]) for about in found]
    assert loaded == [loaded[0], loaded[0], f"{loaded[0]}Q", f"{loaded[0]}QP"]
    assert loaded[0].count("P") == 1
    assert len({about["parent"] for about in found}) == 1
    assert len({about["process"] for about in found}) == 4
    assert {about["threads"] for about in found} == {1}


def test_runs_are_out_of_the_reach_of_ctrl_c(tmp_path, shared):
    assert do(shared, "apart", tell=str(tmp_path / "told")) is None
    assert_apart(told(tmp_path / "told"))


def assert_apart(about):
    assert about["group"] == about["process"] != os.getpgid(0)
    assert about["session"] != os.getsid(0)


@linux
def test_data_that_can_not_be_loaded_leave_it_to_the_run_to_say_so(tmp_path, shared):
    output = tmp_path / "printed.txt"
    assert do(shared, "tries", output=str(output), warm={"data": "missing"}) is None
    assert "FileNotFoundError: no such data" in output.read_text()


@linux
def test_the_death_of_the_server_ends_its_runs_and_a_new_one_takes_its_place(tmp_path):
    engine = local()
    engine.submit(Order("bystander", {"do": "hang", "tell": str(tmp_path / "bystander")}))
    bystander = told(tmp_path / "bystander")
    # Data that kill the server while it loads them are loaded by the run itself the next time.
    engine.submit(Order("poisoned", {"tell": str(tmp_path / "poisoned"), "warm": {"data": "poison"}}))
    found = ended(engine, 2)
    assert found["poisoned"] is None
    assert found["bystander"].startswith("the process that it was forked from is gone: killed by signal 9 (SIGKILL)")
    until(lambda: not alive(bystander["process"]), "the bystander to die")
    assert do(engine, "next", tell=str(tmp_path / "next"), warm={"data": "B"}) is None
    assert told(tmp_path / "next")["loaded"] == ["B"]

    engine.submit(Order("lost", {"do": "hang_with_children", "child": str(tmp_path / "child"), "warm": {"data": "C"}}))
    child = until(lambda: _text(tmp_path / "child"), "the run's own process")
    os.kill(told(tmp_path / "next")["parent"], signal.SIGKILL)
    engine.submit(Order("waiting", {"tell": str(tmp_path / "waiting")}))
    found = ended(engine, 2)
    assert found["waiting"] is None
    assert "is gone: killed by signal 9 (SIGKILL)" in found["lost"]
    until(lambda: not alive(child), "what the run had started to die")
    assert len({told(tmp_path / name)["parent"] for name in ("bystander", "poisoned", "next", "waiting")}) == 3
    engine.close()


@linux
def test_a_server_with_threads_forks_nothing(tmp_path):
    engine = local()
    output = tmp_path / "printed.txt"
    payload = {"tell": str(tmp_path / "told"), "output": str(output), "warm": {"data": "thread"}}
    assert do(engine, "threaded", **payload) is None
    assert told(tmp_path / "told")["parent"] == os.getpid()
    assert "loading its data has left 2 threads" in output.read_text()
    engine.close()


DRIVER = """
import sys
from adapterzoo.ablation.engines.engine import Order
from adapterzoo.ablation.engines.making import make_engine
folder = sys.argv[1]
here = {"perform": "tests.engine_runs:perform", "warm": "tests.engine_runs:warm"}
for fresh in (False, True):
    engine = make_engine("local", {"workers": 1, "fresh": fresh, **here})
    what = {"do": "hang"} if fresh else {"do": "hang_with_children", "child": f"{folder}/child"}
    engine.submit(Order("run", {"tell": f"{folder}/{fresh}", **what}))
while True:
    engine.wait(1.0)
"""


@linux
def test_nothing_outlives_a_driver_that_is_killed(tmp_path):
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], cwd=REPO)
    try:
        forked, fresh = told(tmp_path / "False"), told(tmp_path / "True")
        child = int(until(lambda: _text(tmp_path / "child"), "the run's own process"))
        processes = {forked["parent"], forked["process"], child, fresh["process"]}
        assert all(alive(process) for process in processes)
    finally:
        driver.kill()
        driver.wait()
    until(lambda: not any(alive(process) for process in processes), "everything to die")


@linux
def test_closing_kills_what_runs_and_what_that_has_started_and_nothing_does_before(tmp_path):
    made = []
    for fresh in (False, True):
        # Linux would take the end of the thread that starts a process for the end of its parent.
        thread = threading.Thread(target=_begin, args=(made, fresh, tmp_path))
        thread.start()
        thread.join()
    processes = [told(tmp_path / f"run {fresh}")["process"] for fresh in (False, True)]
    processes += [int(until(lambda n=n: _text(tmp_path / f"child {n}"), "a child")) for n in (False, True)]
    assert [engine.wait(0.1) for engine in made] == [[], []]
    assert all(alive(process) for process in processes)
    for engine in made:
        engine.close()
        engine.close()
        assert engine.wait(0) == []
    until(lambda: not any(alive(process) for process in processes), "the runs to die")


def _begin(made, fresh, folder):
    engine = local(fresh=fresh, workers=1)
    made.append(engine)
    child, tell = str(folder / f"child {fresh}"), str(folder / f"run {fresh}")
    engine.submit(Order("run", {"do": "hang_with_children", "child": child, "tell": tell}))


@linux
def test_a_run_is_done_though_it_leaves_a_process_behind(tmp_path, shared):
    assert do(shared, "litter", do="leave_a_child", child=str(tmp_path / "child")) is None
    until(lambda: not alive(_text(tmp_path / "child")), "what was left to be killed")


@linux
def test_many_runs_leave_no_files_open_and_no_dead_processes(tmp_path, shared):
    assert do(shared, "first", tell=str(tmp_path / "told")) is None
    server = told(tmp_path / "told")["parent"]
    before = [_open_files(process) for process in (os.getpid(), server)]
    submitted = done = 0
    while done < 150:
        while submitted - done < 2:
            shared.submit(Order(str(submitted), {"do": "os_exit" if submitted % 5 == 0 else "nothing"}))
            submitted += 1
        done += len(shared.wait(1.0))
    while done < submitted:
        done += len(shared.wait(1.0))
    assert [_open_files(process) for process in (os.getpid(), server)] == before
    assert Path(f"/proc/{server}/task/{server}/children").read_text() == ""


def test_no_more_runs_at_a_time_than_slots(tmp_path, shared):
    assert shared.capacity == 2
    for number in range(4):
        payload = {"do": "hang", "go": str(tmp_path / f"go{number}"), "tell": str(tmp_path / str(number))}
        shared.submit(Order(str(number), payload))
    told(tmp_path / "0"), told(tmp_path / "1")
    assert shared.wait(0.2) == []
    assert not (tmp_path / "2").exists()
    (tmp_path / "go1").touch()
    assert ended(shared, 1) == {"1": None}
    told(tmp_path / "2")
    assert not (tmp_path / "3").exists()
    for number in (0, 2, 3):
        (tmp_path / f"go{number}").touch()
    assert ended(shared, 3) == {"0": None, "2": None, "3": None}


def test_each_slot_of_a_gpu_sees_its_own_from_a_process_that_is_new(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-abc,7")
    engine = make_engine("local", {"gpus": [0, 2], "per_gpu": 2, **HERE})
    assert engine.capacity == 4
    ways = {"leave_a_child": {"child": str(tmp_path / "child")}, "segfault": {"output": str(tmp_path / "printed")}}
    for way, more in ways.items():
        engine.submit(Order(way, {"do": way, "tell": str(tmp_path / way), **more}))
    found = ended(engine, 2)
    assert found["leave_a_child"] is None
    assert found["segfault"].startswith(ENDS["segfault"])
    engine.close()
    about = [told(tmp_path / way) for way in ways]
    assert [one["gpu"] for one in about] == ["4", "7"]
    assert {one["parent"] for one in about} == {os.getpid()}
    assert_apart(about[0])
    if sys.platform == "linux":
        until(lambda: not alive(_text(tmp_path / "child")), "what was left to be killed")
    assert make_engine("local", {"gpus": "all", "per_gpu": 3}).capacity == 9


def test_a_run_on_a_gpu_is_never_forked(tmp_path, shared):
    assert do(shared, "gpu", do="raise", device="cuda", tell=str(tmp_path / "told")) == ENDS["raise"]
    assert told(tmp_path / "told")["parent"] == os.getpid()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": [0, 3]}, r"2 GPUs visible, and gpus asks for \[0, 3\]"),
        ({"gpus": [1, "7"]}, "a GPU is named twice: 7, 7; per_gpu says how many"),
        ({"gpus": [0], "workers": 2}, "workers and gpus can't both be given"),
        ({"per_gpu": 2}, "per_gpu is given and gpus are not"),
        ({"workers": 0, "threds": 2}, r"(?s)workers = 0: .*greater than 0.*no option 'threds'.*did you mean 'threads'"),
    ],
)
def test_options_that_can_not_be_are_all_said(monkeypatch, options, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with pytest.raises(GridError, match=message):
        make_engine("local", options)


def test_asking_for_gpus_where_there_are_none_is_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(GridError, match="0 GPUs visible, and gpus asks for all"):
        make_engine("local", {"gpus": "all"})


def test_unknown_engines_are_refused_with_the_nearest_name():
    with pytest.raises(GridError, match=r"unknown engine 'slrum'; known engines: .*did you mean 'slurm'\?"):
        make_engine("slrum")


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, name, package):
    for module in [module for module in sys.modules if module.startswith("adapterzoo.ablation.engines.")]:
        monkeypatch.delitem(sys.modules, module)
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [_Without(package), *sys.meta_path])
    with pytest.raises(MissingPackageError, match=rf'{package}.*pip install "adapterzoo\[{name}\]"'):
        making.make_engine(name)


class _Without:
    """An installation that lacks a package."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_server_that_can_not_start_says_why():
    engine = make_engine("local", {"workers": 1, "perform": "tests.no_such_module:perform"})
    engine.submit(Order("never", {}))
    with pytest.raises(RunsError, match=r"could not start.*No module named 'tests\.no_such_module'.*fresh=true"):
        ended(engine, 1)
    engine.close()


LIFELINE = """
import os, runpy, signal, sys
die_with = runpy.run_path(sys.argv[1])["die_with"]
reading, writing = os.pipe()
child = os.fork()
if not child:
    os.close(writing)
    die_with(os.getppid(), reading, linux=False)
    print(os.getpid(), flush=True)
    signal.pause()
os.waitpid(child, 0)
"""


@linux
def test_where_the_kernel_can_not_be_asked_a_pipe_says_that_the_parent_is_gone():
    command = [sys.executable, "-c", LIFELINE, child_module.__file__]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with parent:
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.kill()
    until(lambda: not alive(child), "the child to see it")


def test_inline_does_one_order_after_the_other_in_this_process(tmp_path):
    engine = make_engine("inline", {"perform": HERE["perform"]})
    assert engine.wait(0) == []
    for way in ("nothing", "raise", "sys_exit"):
        engine.submit(Order(way, {"do": way, "tell": str(tmp_path / way)}))
    assert [(item.key, item.problem) for _ in range(3) for item in engine.wait(0)] == [
        (way, ENDS[way]) for way in ("nothing", "raise", "sys_exit")
    ]
    assert told(tmp_path / "nothing")["process"] == os.getpid()
    engine.submit(Order("late", {"tell": str(tmp_path / "late")}))
    engine.close()
    assert engine.wait(0) == []
    assert not (tmp_path / "late").exists()


@linux
def test_the_same_grid_gives_the_same_results_inline_forked_and_fresh(tmp_path):
    expected = carried_out(tmp_path / "inline", make_engine("inline"))
    for fresh in (False, True):
        assert carried_out(tmp_path / str(fresh), make_engine("local", {"workers": 2, "fresh": fresh})) == expected


def test_endings_are_said_from_what_is_known(tmp_path):
    words = tmp_path / "words"
    words.write_bytes(b"\xff\n" * 9000 + b"one\n\n two\nthree\nExtension modules: torch\n")
    assert ending(1, b"", str(words)).endswith("(os._exit?); its last words: one | two | three")
    assert ending(-64, b'{"prob') == "killed by signal 64 (SIGRTMAX)"
    assert ending(-99) == "killed by signal 99"
    assert last_words(tmp_path / "none") == ""


def test_every_engine_is_known_by_its_own_name():
    for name, kind in ENGINES.items():
        assert getattr(__import__(f"adapterzoo.ablation.engines.{kind.module}", fromlist=["x"]), kind.cls).name == name


def _text(path):
    return path.read_text() if path.exists() else ""


def _open_files(process):
    return len(list(Path(f"/proc/{process}/fd").iterdir()))
