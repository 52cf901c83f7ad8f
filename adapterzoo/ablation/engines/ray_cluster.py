"""A Ray cluster: reach it, count what it has room for, and see that its machines find the folder of runs."""

import math
import os
import platform
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from adapterzoo.ablation.engines.calling import PERFORM
from adapterzoo.errors import GridError, RunsError, listing

_SEEN_WITHIN = 20.0


class RayOptions(BaseModel):
    """What `ray` can be told.

    Args:
        address: of a cluster that is there: "auto", or "ray://host:10001"; a cluster on this machine is started, and
            ended with the engine, if not given.
        workers: runs at a time; as many as the cluster has room for if not given. A cluster that grows with its queue
            needs it said.
        num_cpus, num_gpus: what Ray reserves for a run; fractions are fine.
        max_retries: how often a run is begun again whose worker was lost: killed, out of memory, its machine gone. What
            a run raises is its result, and no reason to try again.
        runtime_env: as Ray has it, for a cluster whose machines lack something.
        perform: what carries an order out, as "module:function".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str | None = None
    workers: PositiveInt | None = None
    num_cpus: PositiveFloat = 1.0
    num_gpus: NonNegativeFloat = 0.0
    max_retries: NonNegativeInt = 3
    runtime_env: dict[str, Any] | None = None
    perform: str = PERFORM


def connect(options: RayOptions) -> bool:
    """Be connected to a cluster.

    Returns:
        Whether the connection is ours to end.

    Raises:
        GridError: there is none.
    """
    if ray.is_initialized():
        return False
    local = {}
    if options.address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cpus = math.ceil(options.workers * options.num_cpus) if options.workers else None
        gpus = math.ceil(options.workers * options.num_gpus) if options.workers and options.num_gpus else None
        local = {"num_cpus": cpus, "num_gpus": gpus, "include_dashboard": False}
    try:
        ray.init(
            address=options.address or "local",
            runtime_env=options.runtime_env,
            log_to_driver=False,
            logging_level="ERROR",
            **local,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise GridError(f"no Ray cluster at {options.address or 'this machine'}: {first_line(error)}") from error
    return True


def check_room(options: RayOptions) -> None:
    """See that some machine can take a run.

    Raises:
        GridError: none can, and the cluster is not said to grow.
    """
    nodes = _nodes()
    if options.workers is not None or any(_room(node, options) for node in nodes):
        return
    have = [f"{node['NodeManagerHostname']}: {_amounts(node)}" for node in nodes]
    raise GridError(
        f"a run asks for num_cpus={options.num_cpus:g} and num_gpus={options.num_gpus:g}, and no machine of the Ray "
        f"cluster has that; ask for less, or give workers= if the cluster grows with its queue:{listing(have)}"
    )


def room(options: RayOptions) -> int:
    """How many runs the cluster has room for; at least one, so that one that is still empty begins to grow."""
    return max(1, sum(_room(node, options) for node in _nodes()))


def check_seen(folder: Path, look: Callable[[str], Mapping[str, bool]]) -> None:
    """See that every machine finds a folder under the same path.

    Args:
        folder: of runs.
        look: whether each machine, by its name, finds a file.

    Raises:
        RunsError: some don't; they are named.
    """
    probe = folder / f".partial-probe-{secrets.token_hex(4)}"
    probe.touch()
    try:
        blind = [machine for machine, found in look(str(probe)).items() if not found]
    finally:
        probe.unlink(missing_ok=True)
    if blind:
        raise RunsError(
            f"these machines of the Ray cluster do not see {folder}, in which this one ({platform.node()}) has just "
            f"made a file; put the folder of runs on a disk that all of them mount at the same path:{listing(blind)}"
        )


def look(path: str) -> dict[str, bool]:
    """Ask every machine for a file."""
    task = ray.remote(num_cpus=0, max_retries=1)(_sees)
    nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in _nodes()}
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(path): machine
        for node, machine in nodes.items()
    }
    return {machine: ray.get(reference) for reference, machine in asked.items()}


def _sees(path: str) -> bool:
    end = time.monotonic() + _SEEN_WITHIN  # a shared disk may show a new file late
    while not Path(path).exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def first_line(error: BaseException) -> str:
    """The first line of an error that says anything."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _room(node: Mapping[str, Any], options: RayOptions) -> int:
    """How many runs fit on a machine."""
    has = node["Resources"]
    fits = [has.get("CPU", 0) / options.num_cpus]
    if options.num_gpus:
        fits.append(has.get("GPU", 0) / options.num_gpus)
    whole: int = math.floor(min(fits) + 1e-9)
    return whole


def _amounts(node: Mapping[str, Any]) -> str:
    return ", ".join(f"{node['Resources'].get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
