"""Two processes (gloo, on the CPU): DDP and FSDP2 against one process; processes_worker.py holds what they check."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed

WORKER = Path(__file__).with_name("processes_worker.py")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def run(group, folder, world=2, seconds=120.0):
    """Let every process run a group of checks; fail with what the failing ones say, and leave none behind."""
    command = [sys.executable, str(WORKER), group]
    processes = []
    try:
        for rank in range(world):
            with (folder / f"out{rank}.txt").open("w") as printed:
                values = [str(value) for value in (rank, world, folder, seconds)]
                processes.append(subprocess.Popen([*command, *values], stdout=printed, stderr=printed, cwd=folder))
        codes = wait(processes, seconds + 30)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if codes != [0] * world:
        pytest.fail("\n".join(said(folder, rank, code) for rank, code in enumerate(codes)), pytrace=False)


def wait(processes, seconds):
    """The exit codes, None for one that is still running two seconds after another has failed, or at the end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            end = min(end, time.monotonic() + 2)
        time.sleep(0.05)
    return [process.poll() for process in processes]


def said(folder, rank, code):
    """The report of one process, with the end of what it has printed."""
    report, printed = folder / f"rank{rank}.txt", (folder / f"out{rank}.txt").read_text()[-3000:]
    state = "was still running" if code is None else f"ended with {code}"
    return f"--- rank {rank} {state}\n{report.read_text() if report.exists() else ''}\n{printed}"


@pytest.mark.parametrize("group", ["training", "state", "surgery"])
def test_two_processes(group, tmp_path):
    run(group, tmp_path)


def test_a_failure_in_one_process_is_told_with_its_traceback(tmp_path):
    with pytest.raises(pytest.fail.Exception) as failure:
        run("raises", tmp_path)
    assert "rank 1 ended with 1" in str(failure.value)
    assert "in one_rank_raises_and_the_other_waits" in str(failure.value)
    assert "ValueError: rank 1 has something to say" in str(failure.value)


def test_a_process_that_waits_for_ever_is_ended_and_says_where_it_stands(tmp_path):
    with pytest.raises(pytest.fail.Exception) as failure:
        run("hangs", tmp_path, world=1, seconds=1.0)
    assert "Timeout" in str(failure.value)
    assert "in nothing_comes_of_it" in str(failure.value)
