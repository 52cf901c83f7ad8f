"""What each registered piece costs beside LoRA: generators alone, wrappers around LoRA, and MAP around what is bulky.

No row has a reach: LoRA's price is the promise of the thin normal form alone, and this table shows who leaves it.
"""

from functools import partial

from torch import nn

from adapterzoo import MAP, LoRA
from adapterzoo.pieces import Piece, Wrapper
from adapterzoo.registry import pieces
from benchmarks.counted import alive_bytes, flops
from benchmarks.layers import Bench
from benchmarks.options import Options
from benchmarks.paired import compare, pairs_within
from benchmarks.result import Result
from benchmarks.steps import constants, training_step

OPERATIONS = "operations of a step / LoRA's"
ALIVE = "bytes alive after forward / one output (4 T out)"
TIME = "time of a step / LoRA's"
SECONDS = 100.0  # for all rows together


def specs(rank: int) -> dict[str, Piece]:
    """A spec for every row, by its name."""
    rows: dict[str, Piece] = {"LoRA": LoRA(r=rank)}
    for name, kind in sorted(pieces().items()):
        inside = [LoRA(r=rank)] if issubclass(kind, Wrapper) else []
        options = {"r": rank} if "r" in kind.model_fields else {}
        if kind.roles:  # what has no parameters takes no step
            rows[f"{name}(LoRA)" if inside else name] = kind(*inside, **options)
    bulky = ("LoHa", "LoKr", "Full", "ColumnDoRA(LoRA)", "BoRA(LoRA)", "OFT(LoRA)")
    return rows | {f"MAP({name})": MAP(rows[name]) for name in bulky if name in rows}


def run(options: Options) -> Result:
    """Count and time one step of one layer for every row."""
    size, tokens, rank = (512, 256, 16) if options.quick else (2048, 1024, 16)
    bench = Bench(size, size, tokens, options, rank)
    result = Result(
        "every_piece",
        "a training step of one layer (forward, backward with the gradient of x, fused AdamW) under every piece",
        {"in": size, "out": size, "tokens": tokens, "rank": rank, "dtype": "float32"},
        held=not options.quick,
    )
    layers = bench.all_of(specs(rank))
    _count(result, bench, layers)
    steps = {name: training_step(layer, bench.x, bench.dy) for name, layer in layers.items()}
    pairs = pairs_within(5.0 if options.quick else SECONDS, steps.values(), 5, 41, options.cuda)
    result.add_times(compare(steps, "LoRA", pairs, options.seed, cuda=options.cuda), TIME)
    return result


def _count(result: Result, bench: Bench, layers: dict[str, nn.Module]) -> None:
    counts = {}
    for name, layer in layers.items():
        step = training_step(layer, bench.x, bench.dy)
        step()  # the first step fills what is kept of the frozen weight
        counts[name] = flops(step)
    for name, count in counts.items():
        result.add(name, OPERATIONS, count / counts["LoRA"], None, f"{count / 1e9:.2f} GFLOP")
    for name, layer in layers.items():
        had = alive_bytes(partial(layer.train(), bench.x), constants(layer, bench.x)) / bench.dy.nbytes
        result.add(name, ALIVE, had)
