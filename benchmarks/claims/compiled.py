"""torch.compile takes any pair whole: one graph, no break, and no recompilation after the second step."""

from functools import partial
from time import perf_counter

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from adapterzoo import MAP, SORA, AdaLoRA, DoRA, FLoRA, LoRA, PreDiag, adapt
from adapterzoo.pieces import Piece
from benchmarks.layers import CONTROL, PEFT_DORA, PEFT_LORA, peft_config, perturbed
from benchmarks.options import Options
from benchmarks.paired import Step, compare
from benchmarks.result import Result
from benchmarks.specs import SIX_DEEP, deep
from benchmarks.steps import model_step

RANK, WIDTH, INNER, TOKENS = 16, 512, 2048, 512
LORA = LoRA(r=RANK)
COUNTED: dict[str, Piece] = {
    "LoRA": LORA,
    "MAP(AdaLoRA)": MAP(AdaLoRA(r=RANK)),
    "DoRA(FLoRA)": DoRA(FLoRA(r=RANK)),
    "PreDiag(LoRA), dropout": PreDiag(LoRA(r=RANK, dropout=0.05)),
    "SORA(PreDiag(LoRA))": SORA(PreDiag(LORA)),
    "DoRA(SORA(LoRA), exp)": DoRA(SORA(LORA, map="exp")),
    SIX_DEEP: deep(6, RANK),
}
TIMED: dict[str, Piece] = {
    "LoRA": LORA,
    "MAP(LoRA)": MAP(LORA),
    "DoRA(LoRA)": DoRA(LORA),
    SIX_DEEP: COUNTED[SIX_DEEP],
}


def run(options: Options) -> Result:
    """Count graphs for several pairs; time steps of what Inductor makes of some, next to PEFT's, in one process."""
    pairs = 5 if options.quick else 41
    result = Result(
        "compiled",
        "a perceptron of two adapted layers under torch.compile, trained: graphs, and time of a step",
        {"width": WIDTH, "inner width": INNER, "tokens": TOKENS, "rank": RANK, "pairs": pairs},
    )
    torch._dynamo.config.recompile_limit = 64  # per code object, which all of these models share
    torch.manual_seed(options.seed)
    x = torch.randn(TOKENS, WIDTH, device=options.device, requires_grad=True)
    base = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)).to(options.device)
    state = base.state_dict()
    pairs_counted = {SIX_DEEP: COUNTED[SIX_DEEP]} if options.quick else COUNTED
    counted = {name: _ours(state, spec, options) for name, spec in pairs_counted.items()}
    counted |= {PEFT_LORA: _peft(state, False, options), PEFT_DORA: _peft(state, True, options)}
    for name, model in counted.items():
        for what, number, reach in _graphs(model, x):
            result.add(name, f"{what}, aot_eager", number, reach if name in COUNTED else None)
    specs = {"MAP(LoRA)": TIMED["MAP(LoRA)"]} if options.quick else TIMED
    models = {PEFT_LORA: _peft(state, False, options), CONTROL: _peft(state, False, options)}
    models |= {name: _ours(state, spec, options) for name, spec in specs.items()}
    torch._dynamo.reset()
    with fresh_cache():  # or the seconds to compile would be those of reading a file
        steps = {name: _compiled(model, x, name, result) for name, model in models.items()}
        found = compare(steps, PEFT_LORA, pairs, options.seed, cuda=options.cuda)
    result.add_times(found, "time of a compiled step / compiled PEFT LoRA's")
    return result


# PEFT's DoRA is not timed here: its graph breaks make Dynamo skip the code of nn.Sequential, for every model.
def _compiled(model: nn.Module, x: Tensor, name: str, result: Result) -> Step:
    """A step of the compiled model, which has run once."""
    counters.clear()
    step = model_step(model, partial(torch.compile(model, fullgraph=True), x), torch.randn_like(x), x)
    start = perf_counter()
    step()
    result.add(name, "seconds to compile, Inductor without its caches", perf_counter() - start)
    result.add(name, "graphs of a forward, Inductor", _graph_count(), 1 if name in TIMED else None)
    assert _graph_count() or name == CONTROL, f"{name} was not compiled"
    return step


def _graphs(model: nn.Module, x: Tensor) -> list[tuple[str, int, int]]:
    """Name, number and reach of graphs after two steps, of breaks, and of graphs that further steps add."""
    torch._dynamo.reset()
    counters.clear()
    step = model_step(model, partial(torch.compile(model, backend="aot_eager"), x), torch.ones_like(x), x)
    step()
    step()
    first = _graph_count()
    for _ in range(3):
        step()
    later = _graph_count() - first
    breaks = sum(counters["graph_break"].values())
    return [("graphs of a forward", first, 1), ("breaks", breaks, 0), ("recompilations after step 2", later, 0)]


def _graph_count() -> int:
    """Graphs since the counters were cleared; a control has none of its own, it runs its twin's."""
    return int(counters["stats"]["unique_graphs"])


def _ours(state: dict[str, Tensor], spec: Piece, options: Options) -> nn.Module:
    model = _perceptron(state, options)
    adapt(model, spec)
    return perturbed(model, options.seed)


def _peft(state: dict[str, Tensor], dora: bool, options: Options) -> nn.Module:
    return perturbed(
        inject_adapter_in_model(peft_config(["0", "2"], RANK, dora, 0.0), _perceptron(state, options)), options.seed
    )


def _perceptron(state: dict[str, Tensor], options: Options) -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)).to(options.device)
    model.load_state_dict(state)
    return model
