"""Building and merging the adapters of a Llama-7B takes seconds: no decomposition of a weight, no copy too many."""

import copy
import random
from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch
from peft import get_peft_model
from torch import nn

from adapterzoo import MAP, DoRA, LoRA, adapt, merge
from adapterzoo.pieces import Piece
from benchmarks.layers import CONTROL, PEFT_DORA, PEFT_LORA, peft_config, perturbed
from benchmarks.options import Options
from benchmarks.paired import summarise
from benchmarks.result import Result
from benchmarks.specs import SIX_DEEP, deep

RANK, BLOCKS = 16, 32
Build = Callable[[nn.Module], nn.Module]
Merge = Callable[[nn.Module], object]


def run(options: Options) -> Result:
    """Adapt and merge one block of Llama-7B several times; the model has 32 of them, and takes 32 times as long."""
    hidden, inner, pairs = (1024, 2816, 3) if options.quick else (4096, 11008, 5)
    result = Result(
        "merge_and_init_7b",
        "time to build and to merge the adapters of all linear layers of one Llama-7B block in bf16; 32 blocks by rule "
        "of three",
        {"hidden": hidden, "intermediate": inner, "rank": RANK, "dtype": "bfloat16", "pairs": pairs, "blocks timed": 1,
         "merge": "the base weights are not kept; ours checks that W' is finite, as PEFT's safe merge does"},
    )  # fmt: skip
    torch.manual_seed(options.seed)
    block, order, stream = _block(hidden, inner, options), list(_candidates()), random.Random(options.seed)
    built: dict[str, list[float]] = {name: [] for name in order}
    merged: dict[str, list[float]] = {name: [] for name in order}
    for number in range(pairs + 1):
        stream.shuffle(order)
        for name in order:
            seconds = _build_and_merge(block, *_candidates()[name], options)
            if number:  # the first round warms up
                built[name].append(seconds[0])
                merged[name].append(seconds[1])
    for phase, times in (("build", built), ("merge", merged)):
        found = summarise(times, PEFT_LORA, pairs, options.seed)
        result.add_times(found, f"time to {phase} / PEFT LoRA's")
        for name, timing in found.timings.items():
            result.add(name, f"seconds to {phase} {BLOCKS} blocks: {BLOCKS} times one", BLOCKS * timing.seconds)
    return result


def _block(hidden: int, inner: int, options: Options) -> nn.Module:
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden))
    shapes |= {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    layers = {
        name: nn.Linear(*shape, bias=False, device=options.device, dtype=torch.bfloat16)
        for name, shape in shapes.items()
    }
    return nn.ModuleDict(layers)


def _candidates() -> dict[str, tuple[Build, Merge]]:
    lora = LoRA(r=RANK)
    specs = {"LoRA": lora, "MAP(LoRA)": MAP(lora), "DoRA(LoRA)": DoRA(lora), SIX_DEEP: deep(6, RANK)}
    return {
        PEFT_LORA: (partial(_peft, dora=False), _merge_peft),
        CONTROL: (partial(_peft, dora=False), _merge_peft),
        f"{PEFT_LORA}, safe merge": (partial(_peft, dora=False), _merge_peft_safely),
        f"{PEFT_DORA}, safe merge": (partial(_peft, dora=True), _merge_peft_safely),
        **{name: (partial(_ours, spec=spec), _merge_ours) for name, spec in specs.items()},
    }


def _ours(block: nn.Module, spec: Piece) -> nn.Module:
    adapt(block, spec)
    return block


def _merge_ours(model: nn.Module) -> None:
    merge(model, keep_base=False)


def _peft(block: nn.Module, dora: bool) -> nn.Module:
    return get_peft_model(block, peft_config(list(block), RANK, dora, 0.0))  # type: ignore[no-any-return, call-overload]


def _merge_peft(model: nn.Module) -> None:
    model.merge_adapter()  # type: ignore[operator]


def _merge_peft_safely(model: nn.Module) -> None:
    model.merge_adapter(safe_merge=True)  # type: ignore[operator]


def _build_and_merge(block: nn.Module, build: Build, join: Merge, options: Options) -> tuple[float, float]:
    """Seconds for each, on a copy of the block; the adapter is moved away from its start in between."""
    block, found = copy.deepcopy(block), []
    building = _seconds(lambda: found.append(build(block)), options)
    perturbed(found[0], options.seed)
    return building, _seconds(lambda: join(found[0]), options)


def _seconds(act: Callable[[], object], options: Options) -> float:
    if options.cuda:
        torch.cuda.synchronize()
    start = perf_counter()
    act()
    if options.cuda:
        torch.cuda.synchronize()
    return perf_counter() - start
