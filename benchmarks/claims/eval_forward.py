"""In evaluation no composition is slower than PEFT's LoRA, and a merged layer is the bare layer."""

import copy

from torch import nn

from adapterzoo import AdaptedLinear
from benchmarks.layers import CONTROL, PEFT_DORA, PEFT_LORA, Bench
from benchmarks.options import Options
from benchmarks.paired import Comparison, compare
from benchmarks.result import Result
from benchmarks.specs import SIX_DEEP, deep, generators, wrapped
from benchmarks.steps import evaluation

BARE, BARE_AGAIN = "bare nn.Linear", "control: bare nn.Linear again"
ALL_TOKENS, PAIRS = (1, 64, 1024), 61


def run(options: Options) -> Result:
    """The forward under no_grad of layers that have run before, unmerged and merged."""
    size, rank, pairs = (512, 16, 11) if options.quick else (2048, 16, PAIRS)
    result = Result(
        "eval_forward",
        "time of a forward under no_grad, in evaluation, once warm",
        {"in": size, "out": size, "rank": rank, "pairs": pairs},
        held=not options.quick,
    )
    for tokens in ALL_TOKENS:
        bench = Bench(size, size, tokens, options, rank)
        ours = {**bench.all_of(generators(rank)), **bench.all_of(wrapped(rank))}
        peers = {PEFT_LORA: bench.peft(), CONTROL: bench.peft(), PEFT_DORA: bench.peft(dora=True)}
        found = _compare(bench, {**peers, **ours}, PEFT_LORA, pairs)
        result.add_times(found, f"tokens {tokens}: time / PEFT LoRA's", dict.fromkeys(ours, 1.0))
        found = _compare(bench, _merged(bench), BARE, pairs)
        result.add_times(found, f"tokens {tokens}, merged: time / the bare layer's")
    return result


def _merged(bench: Bench) -> dict[str, nn.Module]:
    """The bare layer twice, and merged layers of both sides."""
    peer = bench.peft()
    peer.merge()  # type: ignore[operator]
    ours = {name: bench.ours(deep(depth, bench.rank)) for name, depth in (("LoRA", 0), (SIX_DEEP, 6))}
    for layer in ours.values():
        assert isinstance(layer, AdaptedLinear)
        layer.merge(keep_base=False)
    bare = bench.bare()
    return {BARE: bare, BARE_AGAIN: copy.deepcopy(bare), PEFT_LORA: peer, **ours}


def _compare(bench: Bench, layers: dict[str, nn.Module], reference: str, pairs: int) -> Comparison:
    steps = {name: evaluation(layer, bench.x) for name, layer in layers.items()}
    return compare(steps, reference, pairs, bench.options.seed, warm_up=10, cuda=bench.options.cuda)
