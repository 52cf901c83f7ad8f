"""DeBERTaV3-base with every linear layer adapted: a step takes as long, and saves as much, as with PEFT's LoRA."""

from functools import partial

from adapterzoo import MAP, DoRA, LoRA
from benchmarks.layers import CONTROL, PEFT_DORA, PEFT_LORA
from benchmarks.models import ModelBench, deberta
from benchmarks.options import Options
from benchmarks.paired import compare
from benchmarks.result import Result

TIME = {"LoRA": 0.97, "MAP(LoRA)": 1.02, "DoRA(LoRA)": 1.03}
SAVED = {"MAP(LoRA)": 1.01, "DoRA(LoRA)": 1.21, "DoRA(LoRA), lean": 1.08}
RANK = 8


def run(options: Options) -> Result:
    """Steps of whole models in one process; the model's own dropout (0.1) is on, the adapters' is 0, on both sides."""
    layers, shape, pairs = (1, (2, 32), 3) if options.quick else (12, (8, 128), 11)
    bench = ModelBench(partial(deberta, layers), shape, 768, options, RANK)
    result = Result(
        "deberta_all_linear",
        "a training step of DeBERTaV3-base (random weights), every linear layer adapted, against PEFT's LoRA",
        {"layers": layers, "batch": shape[0], "length": shape[1], "rank": RANK, "pairs": pairs,
         "adapted layers": len(bench.targets), "the model's dropout": 0.1, "dropout of adapters": 0.0},
        held=not options.quick,
    )  # fmt: skip
    lora = LoRA(r=RANK)
    models = {
        PEFT_LORA: bench.peft(),
        CONTROL: bench.peft(),
        PEFT_DORA: bench.peft(dora=True),
        **bench.all_of({"LoRA": lora, "MAP(LoRA)": MAP(lora), "DoRA(LoRA)": DoRA(lora)}),
        **bench.all_of({"DoRA(LoRA)": DoRA(lora)}, lean=True),
    }
    result.add_bytes({name: bench.bytes_of(model) for name, model in models.items()}, PEFT_LORA, SAVED)
    found = compare(bench.steps(models), PEFT_LORA, pairs, options.seed, warm_up=1, cuda=options.cuda)
    result.add_times(found, "time of a step / PEFT LoRA's", TIME)
    return result
