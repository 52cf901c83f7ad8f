"""A training step of one layer takes as long as PEFT's LoRA, whatever the composition, and much less than its DoRA."""

from torch import nn

from benchmarks.layers import CONTROL, PEFT_DORA, PEFT_LORA, Bench
from benchmarks.options import Options
from benchmarks.paired import Comparison, Step, compare, pairs_within
from benchmarks.result import Result
from benchmarks.specs import SIX_DEEP, deep, generators, wrapped
from benchmarks.steps import products_alone, training_step

REACHES = {
    "LoRA": 0.97,
    "MAP(LoRA)": 1.03,
    "DoRA(LoRA)": 1.03,
    "PreDiag(LoRA)": 1.03,
    "SORA(PreDiag(LoRA))": 1.07,
    SIX_DEEP: 1.15,
}
AGAINST_DORA = {"DoRA(LoRA)": 0.64}
AGAINST_DROPPED_DORA = {"DoRA(LoRA), dropout": 0.50}
DROPOUT, PAIRS = 0.05, 41
FLOOR, DORAS_FLOOR = "floor: LoRA's products alone", "floor: DoRA's products and passes alone"
SIZES, TOKENS = (768, 2048, 4096), (64, 512, 2048, 8192)
SWEEP_SECONDS = 8.0  # per cell, but for the cells in which 5 rounds take longer


def run(options: Options) -> Result:
    """The headline at one shape, with many rounds; then a sweep over shapes, with few."""
    size, tokens, rank = (512, 256, 16) if options.quick else (2048, 1024, 16)
    pairs = 7 if options.quick else PAIRS
    result = Result(
        "linear_step",
        "time of a training step of one layer (forward, backward with the gradient of x, fused AdamW), as a ratio",
        {"in": size, "out": size, "tokens": tokens, "rank": rank, "dtype": "float32", "pairs": pairs,
         "dropout": DROPOUT},
        held=not options.quick,
    )  # fmt: skip
    found = _headline(Bench(size, size, tokens, options, rank), pairs)
    result.add_times(found, "time of a step / PEFT LoRA's, without dropout on either side", REACHES, _plain)
    dora = found.against(PEFT_DORA)
    result.add_times(dora, "time of a step / PEFT DoRA's", AGAINST_DORA, lambda name: "DoRA" in name and _plain(name))
    for peer, reaches in ((PEFT_LORA, None), (PEFT_DORA, AGAINST_DROPPED_DORA)):
        dropped = found.against(f"{peer}, dropout")
        measure = f"time of a step / {peer}'s, with dropout {DROPOUT} on both sides"
        result.add_times(dropped, measure, reaches, lambda name: not _plain(name))
    for size in SIZES[:1] if options.quick else SIZES:
        for tokens in TOKENS[:2] if options.quick else TOKENS:
            cell = _cell(Bench(size, size, tokens, options, rank))
            result.add_times(cell, f"sweep, {size} x {size}, {tokens} tokens: time of a step / PEFT LoRA's")
    return result


def _plain(name: str) -> bool:
    return "dropout" not in name


def _headline(bench: Bench, pairs: int) -> Comparison:
    dropped = {**generators(bench.rank, DROPOUT), **wrapped(bench.rank, DROPOUT)}
    rows = {name: spec for name, spec in wrapped(bench.rank).items() if name != "MAP(LoRA)"}
    layers = {
        PEFT_LORA: bench.peft(),
        CONTROL: bench.peft(),
        PEFT_DORA: bench.peft(dora=True),
        **bench.all_of(generators(bench.rank)),
        **bench.all_of(wrapped(bench.rank)),
        **bench.all_of(rows, lean=True),
        f"{PEFT_LORA}, dropout": bench.peft(dropout=DROPOUT),
        f"{PEFT_DORA}, dropout": bench.peft(dora=True, dropout=DROPOUT),
        **{f"{name}, dropout": bench.ours(dropped[name]) for name in ("LoRA", "MAP(LoRA)", "DoRA(LoRA)", SIX_DEEP)},
    }
    floors = {FLOOR: products_alone(bench), DORAS_FLOOR: products_alone(bench, dora=True)}
    steps = {**_steps(bench, layers), **(floors if bench.options.device == "cpu" else {})}
    return compare(steps, PEFT_LORA, pairs, bench.options.seed, cuda=bench.options.cuda)


def _cell(bench: Bench) -> Comparison:
    layers = {
        PEFT_LORA: bench.peft(),
        CONTROL: bench.peft(),
        PEFT_DORA: bench.peft(dora=True),
        **{name: bench.ours(deep(depth, bench.rank)) for name, depth in (("LoRA", 0), ("MAP(LoRA)", 1))},
        "DoRA(LoRA)": bench.ours(wrapped(bench.rank)["DoRA(LoRA)"]),
        SIX_DEEP: bench.ours(deep(6, bench.rank)),
    }
    steps, seconds = _steps(bench, layers), 0.5 if bench.options.quick else SWEEP_SECONDS
    pairs = pairs_within(seconds, steps.values(), 5, 101, bench.options.cuda)
    return compare(steps, PEFT_LORA, pairs, bench.options.seed, warm_up=0, cuda=bench.options.cuda)


def _steps(bench: Bench, layers: dict[str, nn.Module]) -> dict[str, Step]:
    return {name: training_step(layer, bench.x, bench.dy) for name, layer in layers.items()}
