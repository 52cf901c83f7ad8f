"""A layer's forward leaves behind what LoRA's does: no further tensor of the output's size but one, or none."""

from functools import partial

from adapterzoo import MAP
from benchmarks.counted import alive_bytes, peak_bytes, saved_bytes
from benchmarks.layers import PEFT_DORA, PEFT_LORA, Bench
from benchmarks.options import Options
from benchmarks.result import Result
from benchmarks.specs import SIX_DEEP, generators, wrapped
from benchmarks.steps import constants, training_step

ALIVE = "bytes alive after forward / one output (4 T out)"
SAVED = "bytes saved by autograd / one output: what save_for_backward shows of the above"
PEAK = "peak of a step / one output, on the device"
DROPOUT = 0.05
NO_ROWS, ROWS, DEEP, WITH_DROPOUT = 0.05, 1.1, 1.2, 0.3


def run(options: Options) -> Result:
    """Count the first forward of one layer, so that what it caches counts too."""
    size, tokens, rank = 2048, 1024, 16
    bench = Bench(size, size, tokens, options, rank)
    result = Result(
        "memory_is_loras",
        "what the forward of one layer keeps alive beside x, y and the parameters",
        {"in": size, "out": size, "tokens": tokens, "rank": rank, "dropout": DROPOUT},
    )
    plain = {**generators(rank), **{f"MAP({name})": MAP(spec) for name, spec in generators(rank).items()}}
    rows = {name: spec for name, spec in wrapped(rank).items() if name not in plain}
    dropped = {**generators(rank, DROPOUT), **wrapped(rank, DROPOUT)}
    reaches = {**dict.fromkeys(plain, NO_ROWS), **dict.fromkeys(rows, ROWS), SIX_DEEP: DEEP}
    layers = {
        PEFT_LORA: bench.peft(),
        PEFT_DORA: bench.peft(dora=True),
        f"{PEFT_LORA}, dropout": bench.peft(dropout=DROPOUT),
        f"{PEFT_DORA}, dropout": bench.peft(dora=True, dropout=DROPOUT),
        **bench.all_of(plain),
        **bench.all_of(rows),
        **bench.all_of(rows, lean=True),
        **{f"{name}, dropout": bench.ours(spec) for name, spec in dropped.items()},
    }
    reaches |= {f"{name}, dropout": reaches[name] + WITH_DROPOUT for name in dropped}
    output = bench.dy.nbytes
    for measure, count in ((ALIVE, alive_bytes), (SAVED, saved_bytes)):
        for name, layer in layers.items():
            had = count(partial(layer.train(), bench.x), constants(layer, bench.x)) / output
            result.add(name, measure, had, reaches.get(name) if measure == ALIVE else None)
    if options.cuda:
        for name, layer in layers.items():
            result.add(name, PEAK, peak_bytes(training_step(layer, bench.x, bench.dy), options.device) / output)
    return result
