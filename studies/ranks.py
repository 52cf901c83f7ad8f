"""The study of ranks: does it pay to choose them, and what do they become? `python -m studies ranks`."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from adapterzoo.ablation.docstrings import fingerprint, split, standard_library
from benchmarks.machine import describe
from benchmarks.options import Options
from studies.arms import ARMS, Arm, Settings
from studies.lab import real_lab, score
from studies.schedule import pool, run_study
from studies.store import Store, write

SENTENCE = "Does this docstring describe this function? Fixed against allocated ranks, bare and under MAP and DoRA."
QUICK = Settings(steps=31, batch=4, warmup=2, candidates=8, docstring_tokens=12, code_tokens=16,
                 train=400, validation=20, test=20)  # fmt: skip
"""So small that all runs are done in minutes: it shows that everything runs, and is no evidence."""


def study(
    quick: bool, workers: int, runs: Path, command: str, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[str]]:
    """Do all runs that are not done yet: the result, ready for JSON, and the failures as text."""
    torch.set_num_threads(1)
    settings, arms = (QUICK, _few(ARMS)) if quick else (Settings(), ARMS)
    start, about = perf_counter(), data_about()
    machine = {**describe(Options(threads=1)), "processes": workers}
    say(f"{about['pairs']} pairs, {sum(map(len, map(_jobs, arms)))} runs at most; zero-shot first")
    zero = zero_shot(settings)
    with pool(workers) as executor:
        outcomes, progress = run_study(arms, settings, str(about["fingerprint"]), Store(runs), executor, say)
    result = {
        "study": "ranks", "sentence": SENTENCE, "command": command, "seconds": round(perf_counter() - start),
        "machine": machine, "settings": asdict(settings), "data": about, "zero_shot": zero,
        "arms": [asdict(arm) for arm in arms], "runs_of_earlier_starts": progress.skipped, "runs": outcomes,
    }  # fmt: skip
    return result, progress.failures


def data_about() -> dict[str, object]:
    """How many pairs there are, and a fingerprint of their texts."""
    pairs = standard_library()
    parts = split(pairs)
    return {
        "pairs": len(pairs), "packages": len({pair.package for pair in pairs}), "fingerprint": fingerprint(pairs),
        **{name: _sizes(getattr(parts, name)) for name in ("train", "validation", "test")},
    }  # fmt: skip


def zero_shot(settings: Settings) -> dict[str, Any]:
    """The encoder as it was published, on both sets."""
    lab = real_lab(settings)
    model = lab.build()
    return {"validation": score(model, lab.validation), "test": score(model, lab.test)}


def save(result: Mapping[str, Any], path: Path) -> None:
    """The result as JSON, with a line for each entry and for each run."""
    rows = ",\n".join("  " + json.dumps(run, ensure_ascii=False) for run in result["runs"])
    entries = {name: json.dumps(value, ensure_ascii=False) for name, value in result.items() if name != "runs"}
    lines = [f" {json.dumps(name)}: {text}" for name, text in {**entries, "runs": f"[\n{rows}\n ]"}.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, "{\n" + ",\n".join(lines) + "\n}")


def _sizes(pairs: Sequence[Any]) -> dict[str, int]:
    return {"pairs": len(pairs), "packages": len({pair.package for pair in pairs})}


def _jobs(arm: Arm) -> list[float | int]:
    return [*arm.seeds, *(arm.rates if arm.rate_of is None else ())]


def _few(arms: Sequence[Arm]) -> tuple[Arm, ...]:
    return tuple(map(partial(replace, rates=(3e-3, 1e-2), seeds=(1, 2)), arms))
