"""What quantised kernels round, in outputs and in row norms: the figures of docs/quantised.md.

Run: python docs/figures/quantised_norms.py (a minute on a processor; needs bitsandbytes and torchao).
"""

import logging
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from adapterzoo.factored import FactoredWeight, RightFactor
from adapterzoo.kept import NormCache
from adapterzoo.quantised import QuantisedBase, find

OUT, COLS, RANK = 256, 512, 8
STRENGTHS = (0.01, 0.3, 1.0, 10.0)


def four_bit(plain: nn.Linear, compute: torch.dtype | None = None) -> nn.Module:
    """NF4, with the compute dtype that is asked for."""
    layer = bnb.nn.Linear4bit(plain.in_features, plain.out_features, quant_type="nf4", compute_dtype=compute)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


def eight_bit(plain: nn.Linear) -> nn.Module:
    """LLM.int8(), without outliers kept apart."""
    layer = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


def int8(plain: nn.Linear) -> nn.Module:
    """torchao's weight-only int8."""
    holder = nn.Sequential(plain)
    quantize_(holder, Int8WeightOnlyConfig())
    return holder[0]


LAYERS: dict[str, tuple[Callable[[nn.Linear], nn.Module], bool]] = {
    "bitsandbytes 8-bit, evaluation": (eight_bit, False),
    "bitsandbytes 4-bit, bfloat16 compute dtype": (lambda plain: four_bit(plain, torch.bfloat16), True),
    "bitsandbytes 4-bit": (four_bit, True),
    "torchao int8": (int8, True),
}


def base_of(build: Callable[[nn.Linear], nn.Module], training: bool) -> QuantisedBase:
    """The four calls over a layer of the shape that is measured."""
    torch.manual_seed(3)
    layer = build(nn.Linear(COLS, OUT)).train(training).requires_grad_(False)
    kind = find(layer)
    assert kind is not None
    return kind(layer, layer.weight, NormCache())


class ByKernel:
    """A base whose norms are made by the library's own kernel, too."""

    def __init__(self, base: QuantisedBase) -> None:
        self._base, self.apply = base, base.by_kernel().apply

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def worst_norm(base: Any, U: Tensor, V: Tensor, true: Tensor) -> float:
    """The largest relative error of a row norm of W + U V."""
    norms = FactoredWeight(base, delta=torch.zeros(OUT), U=U, V=RightFactor(base, V)).row_norms()
    return float(((norms.double() - true) / true).abs().max())


@torch.no_grad()
def main() -> None:
    """Print the tables."""
    logging.disable(logging.CRITICAL)
    for name, (build, training) in LAYERS.items():
        base = base_of(build, training)
        W = base.dense().double()
        routes: dict[str, list[float]] = {"kernel": [], "blocks": []}
        updates = []
        for strength in STRENGTHS:
            U, V = torch.randn(OUT, RANK), torch.randn(RANK, COLS)
            updates.append((U * strength * W.norm() / (U @ V).norm(), V))
        left, values, right = torch.linalg.svd(W, full_matrices=False)
        updates.append(((-0.9 * left * values).float(), right.float()))  # takes nine tenths of W away
        for U, V in updates:
            true = (W + U.double() @ V.double()).norm(dim=1)
            routes["kernel"].append(worst_norm(ByKernel(base), U, V, true))
            routes["blocks"].append(worst_norm(base, U, V, true))
        for route, errors in routes.items():
            print(f"{name}, {route}:", *(f"{error:.1e}" for error in errors))
        x = torch.randn(64, COLS)
        for dtype in (torch.float32, torch.bfloat16):
            y, true = base.by_kernel().apply(x.to(dtype)).double(), x.to(dtype).double() @ W.mT
            print(f"{name}, y in {dtype}: {float((y - true).norm() / true.norm()):.1e}")
    for width in (32, 48, 64, 96, 100, 128, 160, 192):
        W = torch.randn(64, width)
        codes, state = bnb.functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
        error = float((bnb.functional.dequantize_4bit(codes, state) - W).norm() / W.norm())
        print(f"bitsandbytes 4-bit, {width} inputs: what it dequantises is off by {error:.1%}")


if __name__ == "__main__":
    main()
