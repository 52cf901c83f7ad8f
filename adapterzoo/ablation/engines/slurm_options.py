"""What the engine `slurm` can be told, and submitit's executor made of it."""

import subprocess
from pathlib import Path
from typing import Any, Literal

import submitit
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, model_validator
from submitit.core.plugins import get_executors

from adapterzoo.ablation.engines.calling import PERFORM
from adapterzoo.errors import GridError, did_you_mean

# submitit's own default is five minutes.
_DEFAULTS = {"name": "adapterzoo", "timeout_min": 240}


class SlurmOptions(BaseModel):
    """What `slurm` can be told; every other option goes to submitit: partition, timeout_min, gpus_per_node, mem_gb...

    Args:
        cluster: "slurm"; "local" and "debug" are submitit's stand-ins on one machine and in one process.
        workers: jobs that are queued or running at a time.
        logs: folder of submitit's own files; "submitit" in the folder of runs if not given.
        gather: seconds for which orders are gathered into one array.
        poll: seconds between two questions to the scheduler; results are looked for in the folder meanwhile.
        lost_after: seconds after which a job that the scheduler knows nothing of is given up.
        grace: seconds that a shared disk may need to show the result of a job that has ended.
        max_num_timeout: how often a job is requeued that ran out of its time.
        perform: what carries an order out, as "module:function".
        parameters: the options that go to submitit; they may also stand beside the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    workers: PositiveInt = 100
    logs: Path | None = None
    gather: PositiveFloat = 5.0
    poll: PositiveFloat = 30.0
    lost_after: PositiveFloat = 1800.0
    grace: PositiveFloat = 30.0
    max_num_timeout: PositiveInt = 3
    perform: str = PERFORM
    parameters: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _sort(cls, given: Any) -> Any:
        """Options of submitit may stand beside the engine's own, and Slurm's go without their prefix."""
        own = {name: value for name, value in given.items() if name in cls.model_fields}
        asked = {**own.pop("parameters", {}), **{name: given[name] for name in given if name not in cls.model_fields}}
        known = _parameters()
        names = [*cls.model_fields, *known]
        unknown = [f"no option {name!r}{did_you_mean(name, names)}" for name in asked if name not in known]
        if unknown:
            raise ValueError("\n  - ".join([*unknown, f"there are {', '.join(names)}"]))
        return {**own, "parameters": {known[name]: value for name, value in asked.items()}}


def make_executor(options: SlurmOptions, folder: Path) -> submitit.AutoExecutor:
    """submitit's executor.

    Raises:
        GridError: it does not take the options, or there is no Slurm here.
    """
    tries = {f"{kind}_max_num_timeout": options.max_num_timeout for kind in ("slurm", "local")}
    try:
        executor = submitit.AutoExecutor(folder, cluster=options.cluster, **tries)
        executor.update_parameters(**{**_DEFAULTS, **options.parameters})
    except (RuntimeError, ValueError, TypeError, NameError, AssertionError) as error:
        here = "; cluster=local tries the same grid without Slurm" if options.cluster == "slurm" else ""
        raise GridError(f"engine 'slurm': {error}{here}") from error
    return executor


def check_accounting() -> None:
    """See that Slurm can say how jobs have ended.

    Raises:
        GridError: it can't: a job that is killed would be waited for without end.
    """
    try:
        asked = subprocess.run(["sacct", "-n", "-j", "1"], capture_output=True, text=True, check=False)
        problem = asked.stderr.strip() if asked.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        raise GridError(f"engine 'slurm': sacct does not answer ({problem}), so jobs that are killed could not be told")


def _parameters() -> dict[str, str]:
    """submitit's options, by the names that they may be given by."""
    common = ["name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node"]
    found = {name: name for name in [*common, "stderr_to_stdout"]}
    for kind, executor in get_executors().items():
        own = sorted(executor._valid_parameters() - found.keys())
        found |= {f"{kind}_{name}": f"{kind}_{name}" for name in own}
        found |= {name: f"{kind}_{name}" for name in own if kind == "slurm"}
    return found
