"""A step of any composition costs LoRA's operations and next to nothing more."""

from benchmarks.counted import flops
from benchmarks.layers import PEFT_DORA, PEFT_LORA, Bench
from benchmarks.options import Options
from benchmarks.result import Result
from benchmarks.specs import SIX_DEEP, generators, wrapped
from benchmarks.steps import training_step

REACHES = {
    "LoRA": 1.001,
    "AdaLoRA": 1.001,
    "FLoRA": 1.001,
    "PreDiag(LoRA)": 1.001,
    "MAP(LoRA)": 1.002,
    "DoRA(LoRA)": 1.009,
    "SORA(PreDiag(LoRA))": 1.021,
    SIX_DEEP: 1.05,
}
MEASURE = "operations of a step / (4 T out in + 6 T r (out + in))"


def run(options: Options) -> Result:
    """Count one step of one layer, at the size of the claim also under --quick: it takes seconds."""
    size, tokens, rank = 2048, 1024, 16
    bench = Bench(size, size, tokens, options, rank)
    result = Result(
        "flops_are_loras",
        "matrix products of a whole training step, the gradient of x included, against LoRA's own by formula",
        {"in": size, "out": size, "tokens": tokens, "rank": rank, "SORA's rank": 4},
    )
    loras = 4 * tokens * size * size + 6 * tokens * rank * (size + size)
    layers = {
        PEFT_LORA: bench.peft(),
        PEFT_DORA: bench.peft(dora=True),
        **bench.all_of(generators(rank)),
        **bench.all_of(wrapped(rank)),
        **bench.all_of(wrapped(rank), lean=True),
    }
    for name, layer in layers.items():
        step = training_step(layer, bench.x, bench.dy)
        step()  # the first step fills what is kept of the frozen weight; nothing else may be kept for the second
        count = flops(step)
        result.add(name, MEASURE, count / loras, REACHES.get(name), f"{count / 1e9:.2f} GFLOP")
    return result
