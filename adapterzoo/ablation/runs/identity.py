"""What makes a run that run and no other: its content, and the hash of it."""

import json
from functools import cache
from hashlib import sha256
from importlib import import_module
from inspect import getsourcefile
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

import adapterzoo.errors
from adapterzoo.ablation.tasks.registry import make_task
from adapterzoo.ablation.tasks.task import Task

ROOT = Path(adapterzoo.errors.__file__).parent
# What a run never executes, so that a change of it makes no run another one.
_NOT_RUN = {
    "checkpoint", "interop", "analysis", "cli.py", "__main__.py", "__init__.py", "ablation/engines", "ablation/grids",
    "ablation/reports", "ablation/trackers", "ablation/recipes", "ablation/runs", "ablation/driving",
    "ablation/command.py", "ablation/__init__.py",
}  # fmt: skip


OTHER_CODE = "this worker has other code"
"""How the problem begins that no run is to blame for; the driver stops when it meets it."""


class RunSpec(BaseModel):
    """One run by its content.

    Args:
        spec: the composition as its canonical text; None trains the head alone.
        task: the task's name and every option, the tuned ones among them.
        seed: of the run.
        test: whether it looks at the test part.
        data: the task's fingerprint.
        code: `code_version` of the task.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: str | None
    task: dict[str, Any]
    seed: int
    test: bool
    data: str
    code: str

    @property
    def id(self) -> str:
        """The name of its directory: 16 hexadecimal digits of a hash of all the above."""
        return digest_of(self.model_dump())

    def make_task(self) -> Task:
        """The task, with its options."""
        return make_task(self.task)


def digest_of(content: Any) -> str:
    """16 hexadecimal digits of the hash of something that JSON can hold; the order of keys does not count."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return sha256(text.encode()).hexdigest()[:16]


def task_options(task: Task) -> dict[str, Any]:
    """A task's name and every option, ready for JSON."""
    return {"name": task.name, **task.model_dump(mode="json")}


def code_version(task: Task) -> str:
    """What computes: torch's version, a hash of this package's sources that a run executes, and the task's file."""
    return f"torch {torch.__version__}, adapterzoo {_own_sources()}, task {_module_source(type(task).__module__)}"


@cache
def _own_sources() -> str:
    digest = sha256()
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not any(name == part or name.startswith(f"{part}/") for part in _NOT_RUN):
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def _module_source(module: str) -> str:
    path = getsourcefile(import_module(module))
    return sha256(Path(path).read_bytes()).hexdigest()[:12] if path else "unknown"
