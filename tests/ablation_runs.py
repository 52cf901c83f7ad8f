"""Synthetic folders of runs, in the format that the driver writes: for tests of reports."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from adapterzoo.ablation.grids.planned import CellRecord, reports
from adapterzoo.ablation.runs.identity import RunSpec

GENERATORS = ("LoRA", "FLoRA", "AdaLoRA")
WRAPPERS = ("bare", "MAP", "DoRA", "SORA(PreDiag)")
TRACEBACK = (
    'Traceback (most recent call last):\n  File "loop.py", line 7, in train\nValueError: the loss is <NaN> & more\n'
)
ENVIRONMENT = {
    "python": "3.12.3",
    "platform": "Linux-6.8-x86_64",
    "packages": {"torch": "2.13.0", "numpy": "2.4.1"},
    "cpu": {"model": "some CPU", "cores": 4},
    "gpus": [],
}
Cell = dict[str, Any]
Value = Callable[[Cell, int], float]


def write_runs(
    folder: Path,
    *,
    generators: Sequence[str] = GENERATORS,
    wrappers: Sequence[str] = WRAPPERS,
    references: Sequence[str] = ("None", "Full()"),
    axes: Mapping[str, Sequence[Any]] | None = None,
    options: Collection[str] = (),
    seeds: int | Sequence[int] = 8,
    value: Value | None = None,
    failed: Collection[tuple[str, int]] = (),
    missing: Collection[tuple[str, int]] = (),
    rates: Sequence[float] = (1e-4, 1e-3, 1e-2),
    metric: str = "accuracy",
    maximise: bool = True,
    percent: bool = True,
    examples: int = 40,
    looks: int = 5,
    others: int = 1,
) -> Path:
    """Write a folder of runs and give it back.

    Args:
        folder: made if it is not there.
        generators: of the grid, such as "LoRA".
        wrappers: of the grid, the bare generator among them as "bare".
        references: cells that no wrapper is applied to.
        axes: further axes by name; {"r": [2, 8]} by default.
        options: which of the axes are options of the task (a dataset); the others stand in the spec (r).
        seeds: of the report, or how many.
        value: the test metric of a cell (as in grid.json) and a seed; a made-up one by default, the
            mean of scores that are 0 or 1.
        failed: (cell, seed) of report runs that ended with an error.
        missing: (cell, seed) of report runs that have not ended.
        rates: tried by every cell on seed 1000; the cell's number decides which is best. None: no tuning.
        metric, maximise, percent: of the task.
        examples: of the test part; 0 writes none.
        looks: at the validation part, points of the curves.
        others: finished runs that are not of the grid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    every = dict(axes or {"r": [2, 8]}) if axes is None else dict(axes)
    cells = [*_references(references), *_cells(generators, wrappers, every, options)]
    seeds = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    records = [_record(cell, seeds, rates, metric, maximise) for cell in cells]
    for number, (cell, record) in enumerate(zip(cells, records, strict=True)):
        best = rates[number % len(rates)] if rates else None
        tuned = {}
        for _, run in record.trials():
            worse = (0.1 if maximise else -0.1) * (run.task["lr"] != best)
            tuned[run.id] = _write_done(folder, cell, run, metric, _made_up(cell, 1000) - worse, None, 1)
        for planned in reports(record, tuned.get):
            run, seed = planned.run, planned.seed
            if (cell["cell"], seed) in failed:
                _write_failed(folder / run.id, run)
            elif (cell["cell"], seed) in missing:
                _write_partial(folder / f".partial-{run.id}-f00d", run)
            else:
                _write_done(folder, cell, run, metric, *_scores(cell, seed, value, examples), looks)
    for number in range(others):
        run = RunSpec(spec="LoRA(r=4)", task={"name": "another"}, seed=number, test=True, data="d", code="c")
        _write_done(folder, cells[0], run, metric, 0.5, None, 1)
    record = {
        "format": 1, "grid": _grid(generators, wrappers, references, every, seeds, rates, options), "metric": metric,
        "maximise": maximise, "percent": percent, "tuned": ["lr"] if rates else [],
        "cells": [asdict(record) for record in records],
    }  # fmt: skip
    (folder / "grid.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    (folder / ".lock").touch()
    (folder / "prepared" / "digits").mkdir(parents=True, exist_ok=True)
    return folder


def _record(cell: Cell, seeds: list[int], rates: Sequence[float], metric: str, maximise: bool) -> CellRecord:
    points = [{"lr": rate} for rate in rates] or [{}]
    ends = {min(rates): {"lr": "min"}, max(rates): {"lr": "max"}} if rates else {}
    return CellRecord(
        **{**cell, "spec": None if cell["spec"] == "None" else cell["spec"]},
        task={"name": "digits", "lr": 1e-3, **{k: v for k, v in cell["axes"].items() if k not in cell["spec"]}},
        metric=metric, maximise=maximise, points=points, tune_seeds=[1000] if rates else [],
        edges=[ends.get(point.get("lr"), {}) for point in points], seeds=seeds, data="d", code="c",
        size={"adapters": _size(cell), "rest": 325, "layers": 2},
    )  # fmt: skip


def _grid(
    generators: Any, wrappers: Any, references: Any, axes: Any, seeds: Any, rates: Any, options: Collection[str]
) -> dict[str, Any]:
    inside = ", ".join(f"{name}={{{name}}}" for name in axes if name not in options)
    product = {
        "spec": {name: f"{name}({inside})" for name in generators},
        "wrap": {wrapper: _wrapped(wrapper, "{spec}") for wrapper in wrappers},
        "seed": list(seeds),
        "others": {name: list(values) for name, values in axes.items()},
    }
    tune = {"options": {"lr": {"values": list(rates)}}, "trials": len(rates), "on": "validation", "seeds": [1000]}
    return {
        "task": {"name": "digits"},
        "grid": [product],
        "references": [{"spec": spec, "label": "", "tune": None} for spec in references],
        "tune": tune if rates else None,
        "name": "synthetic",
    }


def _wrapped(wrapper: str, spec: str) -> str:
    """SORA(PreDiag) around LoRA(r=2): SORA(PreDiag(LoRA(r=2)))."""
    if wrapper == "bare":
        return spec
    return f"{wrapper[:-1]}({spec}))" if wrapper.endswith(")") else f"{wrapper}({spec})"


def _cells(generators: Any, wrappers: Any, axes: dict[str, Any], options: Collection[str]) -> list[Cell]:
    points: list[dict[str, Any]] = [{}]
    for name, values in axes.items():
        points = [{**point, name: value} for point in points for value in values]
    return [
        _cell(generator, wrapper, point, options)
        for point in points
        for generator in generators
        for wrapper in wrappers
    ]


def _cell(generator: str, wrapper: str, point: dict[str, Any], options: Collection[str]) -> Cell:
    inside = ", ".join(f"{name}={value}" for name, value in point.items() if name not in options)
    outside = ", ".join(f"{name}={value}" for name, value in point.items() if name in options)
    spec = _wrapped(wrapper, f"{generator}({inside})")
    return {
        "cell": f"{spec} [{outside}]" if outside else spec,
        "generator": generator,
        "wrapper": wrapper,
        "spec": spec,
        "reference": False,
        "panel": ", ".join(f"{name}={value}" for name, value in point.items()),
        "axes": point,
    }


def _references(references: Sequence[str]) -> list[Cell]:
    return [
        {"cell": spec, "generator": spec.partition("(")[0], "wrapper": "bare", "spec": spec, "reference": True,
         "panel": "", "axes": {}}
        for spec in references
    ]  # fmt: skip


def _made_up(cell: Cell, seed: int) -> float:
    """What the seed brings is common to all cells, so that pairs differ less than runs do."""
    common = 0.03 * np.random.default_rng([seed, 7]).standard_normal()
    own = np.random.default_rng([seed, *cell["cell"].encode()]).standard_normal()
    gain = {"bare": 0.0, "MAP": 0.02, "DoRA": 0.0}.get(cell["wrapper"], -0.01)
    rank = 0.01 * np.log2(cell["axes"].get("r", 2))
    return float(np.clip(0.8 + gain + rank + common + 0.004 * own, 0.0, 1.0))


def _write_common(path: Path, run: RunSpec) -> None:
    path.mkdir()
    _write_json(path / "run.json", run.model_dump())
    _write_json(path / "environment.json", ENVIRONMENT)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_done(
    folder: Path, cell: Cell, run: RunSpec, metric: str, score: float, scores: Any, looks: int
) -> dict[str, Any]:
    """Write a run that is done, and give its metrics."""
    path = folder / run.id
    _write_common(path, run)
    metrics = _metrics(cell, run.seed, metric, score, run.test)
    written = {name: value if np.isfinite(value) else None for name, value in metrics.items()}
    _write_json(path / "result.json", {"status": "done", "metrics": written, "seconds": 2.0 + run.seed % 3})
    _write_curves(path, cell, metric, score, looks)
    if scores is not None:
        ids = np.arange(len(scores))
        np.savez(path / "examples.npz", id=ids, score=scores, label=ids % 5)
    return metrics


def _scores(cell: Cell, seed: int, value: Value | None, size: int) -> tuple[float, Any]:
    """The metric and the examples' scores, of which it is the mean: 0 and 1, or any number where the value is given."""
    score = (value or _made_up)(cell, seed)
    if not size:
        return score, None
    difficulty = np.random.default_rng(11).uniform(size=size)
    noise = 0.1 * np.random.default_rng([seed, *cell["cell"].encode()]).standard_normal(size)
    if value is not None:
        return score, score + noise - noise.mean()
    right = (difficulty + noise < score).astype(np.float32)
    return float(right.mean()), right


def _metrics(cell: Cell, seed: int, metric: str, score: float, tested: bool) -> dict[str, float]:
    size = _size(cell)
    part = {f"test/{metric}": score, "test/loss": 1.5 - score} if tested else {}
    return {
        f"validation/{metric}": score - 0.01,
        "validation/loss": 1.5 - score,
        **part,
        "adapter_parameters": size,
        "head_parameters": 325,
        "ms_per_step": 2.0 + 0.1 * len(cell["wrapper"]) + 0.01 * (seed % 3),
        "memory_bytes": 1_000_000 + 8 * size,
    }


def _size(cell: Cell) -> int:
    extra = 0 if cell["wrapper"] == "bare" else 10 * len(cell["wrapper"])
    return {"None": 0, "Full()": 100_000}.get(cell["spec"], 500 * int(cell["axes"].get("r", 2)) + extra)


def _write_curves(path: Path, cell: Cell, metric: str, score: float, looks: int) -> None:
    lines = []
    for look in range(1, looks + 1):
        share = look / looks
        line = {"step": 10 * look, "loss": 2 - share, "lr": 1e-3 * (1 - share), f"validation/{metric}": score * share}
        if "MAP" in cell["wrapper"]:
            line |= {f"magnitude/{name}/blocks.0": 1 + 0.1 * share for name in ("alpha", "beta")}
        if "DoRA" in cell["wrapper"]:
            line |= {"magnitude/m/blocks.0": 1 + 0.05 * share}
        if cell["generator"] == "AdaLoRA":
            line |= {"rank/blocks.0": 4 - look // 2}
        lines.append(json.dumps(line) + "\n")
    (path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")


def _write_failed(path: Path, run: RunSpec) -> None:
    _write_common(path, run)
    error = {"type": "ValueError", "message": "the loss is <NaN> & more\nsecond line", "traceback": TRACEBACK}
    _write_json(path / "result.json", {"status": "failed", "metrics": {}, "seconds": 0.5, "error": error})
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")


def _write_partial(path: Path, run: RunSpec) -> None:
    _write_common(path, run)
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', encoding="utf-8")
