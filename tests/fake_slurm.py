"""A stand-in for Slurm's commands, for tests: sbatch, srun, sacct, scancel and scontrol on one machine.

`install` writes them into a folder; each is this file, and knows by its name what it is. Beside the commands stand what
they leave for each other and for a test: `<job>.state`, `<job>.group`, and `calls`, a line for each call.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scancel", "scontrol")
HERE = Path(sys.argv[0]).parent


def install(folder):
    """Put the commands into a folder that exists."""
    for name in COMMANDS:
        path = folder / name
        path.write_text(f"#!{sys.executable} -IS\n{Path(__file__).read_text()}")
        path.chmod(0o755)


def sbatch(script):
    """Take a job or an array, unless `refusals` says how often not to."""
    refusals = HERE / "refusals"
    left = int(refusals.read_text()) if refusals.exists() else 0
    if left:
        refusals.write_text(str(left - 1))
        sys.exit("sbatch: error: Slurm temporarily unable to accept job")
    job = str(len(list(HERE.glob("*.script"))) + 1)
    text = Path(script).read_text()
    (HERE / f"{job}.script").write_text(text)
    array = re.search(r"--array='?0-(\d+)", text)
    names = [f"{job}_{index}" for index in range(int(array[1]) + 1)] if array else [job]
    for name in names:
        (HERE / f"{name}.state").write_text("PENDING")
        command = [sys.executable, "-IS", str(HERE / "srun"), "--job", name]
        nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        runner = subprocess.Popen(command, start_new_session=True, **nowhere)
        (HERE / f"{name}.group").write_text(str(runner.pid))
    print(f"Submitted batch job {job}")


def run_job(name):
    """What the machine of a job does: run it, and again as often as it is requeued."""
    job, _, index = name.partition("_")
    about = {"SLURM_JOB_ID": job, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0",
             "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # fmt: skip
    if index:
        about |= {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": index}
    state = HERE / f"{name}.state"
    while True:
        state.write_text("RUNNING")
        code = subprocess.run(["bash", str(HERE / f"{job}.script")], env={**os.environ, **about}).returncode
        if state.read_text() != "REQUEUED":
            break
    state.write_text("FAILED" if code else "COMPLETED")


def srun(*arguments):
    """Run a command with its output in files; or, called by `sbatch`, a whole job."""
    if arguments[0] == "--job":
        run_job(arguments[1])
        return
    names = {"%A": "SLURM_ARRAY_JOB_ID", "%a": "SLURM_ARRAY_TASK_ID", "%j": "SLURM_JOB_ID", "%t": "SLURM_PROCID"}
    number = 0
    while arguments[number].startswith("--"):
        if (stream := {"--output": 1, "--error": 2}.get(arguments[number])) is not None:
            number += 1
            path = re.sub("%[Aajt]", lambda found: os.environ[names[found[0]]], arguments[number])
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        number += 1
    os.execvp(arguments[number], arguments[number:])


def sacct(*arguments):
    """What is known of jobs; nothing if a test has said so by a file."""
    if (HERE / "no accounting").exists():
        sys.exit("Slurm accounting storage is disabled")
    print("JobID|State|NodeList")
    if (HERE / "forgetful").exists():
        return
    asked = {argument for flag, argument in itertools.pairwise(arguments) if flag == "-j"}
    for path in HERE.glob("*.state"):
        if path.stem.split("_")[0] in asked:
            print(f"{path.stem}|{path.read_text()}|here")


def scancel(*jobs):
    """Kill jobs."""
    for job in jobs:
        (HERE / f"{job}.state").write_text("CANCELLED by 0")
        try:
            os.killpg(int((HERE / f"{job}.group").read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


def scontrol(verb, job):
    """Requeue a job."""
    assert verb == "requeue"
    (HERE / f"{job}.state").write_text("REQUEUED")


if __name__ == "__main__":
    name = Path(sys.argv[0]).name
    with (HERE / "calls").open("a") as file:
        file.write(f"{name} {' '.join(sys.argv[1:])}\n")
    globals()[name](*sys.argv[1:])
