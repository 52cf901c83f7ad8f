"""A training step of one convolution against PEFT's: what factored updates of kernels cost in time and bytes."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from adapterzoo import MAP, AdaLoRA, AdaptedLinear, DoRA, FLoRA, LoRA, PreDiag
from adapterzoo.pieces import Piece
from benchmarks.counted import alive_bytes
from benchmarks.layers import CONTROL, PEFT_DORA, PEFT_LORA, peft_config, perturbed
from benchmarks.options import Options
from benchmarks.paired import compare
from benchmarks.result import Result
from benchmarks.steps import constants, training_step

RANK, PAIRS = 8, 31
FULL = "the plain layer, trained as a whole"
SHAPES: dict[str, tuple[Callable[[], nn.Conv2d], tuple[int, ...]]] = {
    "3 x 3, 128 channels, 4 x 28 x 28": (lambda: nn.Conv2d(128, 128, 3, padding=1), (4, 128, 28, 28)),
    "1 x 1, 256 channels, 4 x 28 x 28": (lambda: nn.Conv2d(256, 256, 1), (4, 256, 28, 28)),
    "depthwise 3 x 3, 256 channels, 4 x 28 x 28": (
        lambda: nn.Conv2d(256, 256, 3, padding=1, groups=256),
        (4, 256, 28, 28),
    ),
}


def run(options: Options) -> Result:
    """Every shape: times in interleaved rounds, and the bytes that a forward leaves alive."""
    pairs = 5 if options.quick else PAIRS
    result = Result(
        "convolution_step",
        "a training step of one convolution (forward, backward with the gradient of x, fused AdamW)",
        {"rank": RANK, "dtype": "float32", "pairs": pairs},
        held=not options.quick,
    )
    for shape, (build, size) in SHAPES.items():
        torch.manual_seed(options.seed)
        base = build().to(options.device)
        x = torch.randn(size, device=options.device).requires_grad_()
        dy = torch.randn_like(base(x))
        layers = _layers(base, options.seed)
        steps = {name: training_step(layer, x, dy) for name, layer in layers.items()}
        reference = PEFT_LORA if base.groups == 1 else FULL
        found = compare(steps, reference, pairs, options.seed, cuda=options.cuda)
        result.add_times(found, f"{shape}: time of a step / {'PEFT LoRA' if base.groups == 1 else 'full training'}'s")
        for name, layer in layers.items():
            result.add(name, f"{shape}: bytes alive after forward / one output", _alive(layer, x) / dy.nbytes)
    return result


def _layers(base: nn.Conv2d, seed: int) -> dict[str, nn.Module]:
    """Ours, the plain layer, and PEFT's where it computes an update of the kernel (not with groups)."""
    layers: dict[str, nn.Module] = {FULL: copy.deepcopy(base)}
    if base.groups == 1:
        layers |= {PEFT_LORA: _peft(base, seed), CONTROL: _peft(base, seed), PEFT_DORA: _peft(base, seed, dora=True)}
    rank = min(RANK, base.weight[0].numel())
    specs: dict[str, Piece] = {"LoRA": LoRA(r=rank), "AdaLoRA": AdaLoRA(r=rank)}
    if base.groups == 1:
        specs["FLoRA"] = FLoRA(r=(rank, rank, *(min(2, size) for size in base.kernel_size)))
    specs |= {f"{wrap.__name__}(LoRA)": wrap(LoRA(r=rank)) for wrap in (MAP, DoRA, PreDiag)}
    return layers | {name: perturbed(AdaptedLinear(_frozen(base), spec), seed) for name, spec in specs.items()}


def _peft(base: nn.Conv2d, seed: int, dora: bool = False) -> nn.Module:
    holder = nn.Sequential(_frozen(base))
    inject_adapter_in_model(peft_config(["0"], RANK, dora, 0.0), holder)
    return perturbed(holder[0], seed)


def _frozen(base: nn.Conv2d) -> nn.Conv2d:
    return copy.deepcopy(base).requires_grad_(False)


def _alive(layer: nn.Module, x: Tensor) -> int:
    return alive_bytes(partial(layer.train(), x), constants(layer, x))
