"""Blocks of Llama with every linear layer adapted, under 0 to 6 wrappers, against PEFT's LoRA."""

from functools import partial

from benchmarks.layers import CONTROL, PEFT_DORA, PEFT_LORA
from benchmarks.models import ModelBench, llama
from benchmarks.options import Options
from benchmarks.paired import compare
from benchmarks.result import Result
from benchmarks.specs import by_depth, wrapped

RANK = 16


def run(options: Options) -> Result:
    """Steps of whole stacks in one process, without any dropout."""
    layers, shape, pairs = (1, (1, 64), 3) if options.quick else (4, (2, 256), 15)
    bench = ModelBench(partial(llama, layers), shape, 1024, options, RANK)
    result = Result(
        "llama_blocks",
        "a training step of a stack of Llama blocks (random weights), every linear layer adapted, against PEFT's LoRA",
        {"blocks": layers, "hidden": 1024, "intermediate": 2816, "batch": shape[0], "length": shape[1], "rank": RANK,
         "pairs": pairs, "adapted layers": len(bench.targets), "dropout": 0.0},
    )  # fmt: skip
    named = {name: wrapped(RANK)[name] for name in ("MAP(LoRA)", "DoRA(LoRA)", "SORA(PreDiag(LoRA))")}
    chain = {("LoRA" if name == "0 deep" else name): spec for name, spec in by_depth(RANK).items() if name != "1 deep"}
    models = {
        PEFT_LORA: bench.peft(),
        CONTROL: bench.peft(),
        PEFT_DORA: bench.peft(dora=True),
        **bench.all_of(named),
        **bench.all_of(chain),
        **bench.all_of({"6 deep": chain["6 deep"]}, lean=True),
    }
    result.add_bytes({name: bench.bytes_of(model) for name, model in models.items()}, PEFT_LORA)
    found = compare(bench.steps(models), PEFT_LORA, pairs, options.seed, warm_up=1, cuda=options.cuda)
    result.add_times(found, "time of a step / PEFT LoRA's (1 deep is MAP(LoRA))")
    return result
