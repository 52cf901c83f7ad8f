"""Runs of one composition take less time side by side on one base than one by one, where their steps are small.

What is timed is the processor's time of the one thread that does the runs: core-seconds are what a grid spends, and
waiting for neighbours on the machine does not count in them.
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch

from adapterzoo.ablation.packing.pack import pack
from adapterzoo.ablation.tasks.digits import Digits
from adapterzoo.ablation.tasks.minilm import MiniLM
from adapterzoo.ablation.tasks.task import Outcome, Run, Task
from adapterzoo.registry import parse
from benchmarks.options import Options
from benchmarks.paired import Comparison, summarise
from benchmarks.result import Result

APART, CONTROL, PACKED, AUTO = "one by one", "one by one, control", "packed", "auto"
SMALL, ANY = {PACKED: 0.9, AUTO: 0.95}, {AUTO: 1.05}
PAIRS, STEPS, LOOKS = 3, 60, 2


class PackableMiniLM(MiniLM):
    """The task as it is, for packing to be tried."""

    packable = True


class Setting(NamedTuple):
    """A task, and runs of it.

    Attributes:
        name: in the table.
        task: with its options.
        specs: one for each run.
        reaches: by candidate; a share of the time one by one.
    """

    name: str
    task: Task
    specs: Sequence[str]
    reaches: dict[str, float]


def run(options: Options) -> Result:
    """Time whole runs, from building the model to its last score, in four ways."""
    torch.set_num_threads(1)
    pairs = 1 if options.quick else PAIRS
    result = Result(
        "packing",
        "processor time of all runs of a pack, from the model to the last score, over that of the same runs one by one",
        {"steps": "60 of digits, 12 of MiniLM", "looks": LOOKS, "pairs": pairs, "dtype": "float32"},
        held=not options.quick,
    )
    for setting in _settings(options.quick):
        with tempfile.TemporaryDirectory() as folder:
            setting.task.prepare(Path(folder))
            shared = setting.task.load(Path(folder))
            found = _compare(_candidates(setting, shared), pairs, options.seed)
        result.add_times(found, f"{setting.name}: processor time / one by one", setting.reaches)
    return result


def _settings(quick: bool) -> list[Setting]:
    steps = 20 if quick else STEPS
    digits = Digits(steps=steps, looks=LOOKS)
    convnet = Digits(backbone="convnet", steps=steps, looks=LOOKS)
    minilm = PackableMiniLM(
        blocks=2, docstring_tokens=32, code_tokens=32, train=600, validation=64, test=64, steps=12, looks=LOOKS
    )
    bare, mapped, turned = "LoRA(r=2)", "MAP(LoRA(r=2))", "SORA(PreDiag(LoRA(r=2)))"
    every = [f"{wrapper}({bare})" for wrapper in ("MAP", "DoRA", "PreDiag", "SORA")]
    alike = [bare, mapped] if quick else [bare, mapped, turned, "AdaLoRA(r=4, target_r=2)"]
    found = [Setting(f"digits, 8 x {spec}", digits, [spec] * 8, SMALL) for spec in alike]
    if quick:
        return found
    found += [Setting(f"digits, {count} x {mapped}", digits, [mapped] * count, ANY) for count in (2, 4)]
    found += [Setting(f"digits, {', '.join(every)}", digits, every, ANY)]
    found += [Setting(f"convnet, 8 x {spec}", convnet, [spec] * 8, SMALL) for spec in (bare, mapped)]
    deep = "MAP(LoRA(r=4))"
    return [*found, Setting(f"MiniLM's last two blocks, 4 x {deep}", minilm, [deep] * 4, ANY)]


def _candidates(setting: Setting, shared: Any) -> dict[str, Callable[[], object]]:
    device = torch.device("cpu")
    runs = [Run(parse(spec), seed, shared, device, True, _quiet) for seed, spec in enumerate(setting.specs)]
    return {
        APART: partial(_one_by_one, setting.task, runs),
        CONTROL: partial(_one_by_one, setting.task, runs),
        PACKED: partial(pack, setting.task, runs, "packed"),
        AUTO: partial(pack, setting.task, runs, "auto"),
    }


def _compare(candidates: dict[str, Callable[[], object]], pairs: int, seed: int) -> Comparison:
    """Every candidate once in each round, in an order drawn at random, as in `paired.compare`."""
    order, draw = list(candidates), random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(pairs):
        draw.shuffle(order)
        for name in order:
            start = process_time()
            candidates[name]()
            times[name].append(process_time() - start)
    return summarise(times, APART, pairs, seed)


def _one_by_one(task: Task, runs: Sequence[Run]) -> list[Outcome]:
    return [task.run(run) for run in runs]


def _quiet(step: int, metrics: object) -> None:
    """Take no note."""
