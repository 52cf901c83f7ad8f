"""Single linear layers to be measured, ours and PEFT's, on the same base weight, and away from their start."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from adapterzoo import AdaptedLinear
from adapterzoo.pieces import Piece
from benchmarks.options import Options

PEFT_LORA, CONTROL, PEFT_DORA = "PEFT LoRA", "control: PEFT LoRA again", "PEFT DoRA"
AWAY = 0.02  # standard deviation of what is added to every trained value


@dataclass
class Bench:
    """One shape: a base layer, an input and a gradient of the output; every layer gets a copy of the base.

    Attributes:
        in_features, out_features, tokens: the shape.
        rank: of every adapter, ours and PEFT's.
    """

    in_features: int
    out_features: int
    tokens: int
    options: Options
    rank: int = 16
    dtype: torch.dtype = torch.float32
    base: nn.Linear = field(init=False)
    x: Tensor = field(init=False)
    dy: Tensor = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.options.seed)
        device, dtype = self.options.device, self.dtype
        self.base = nn.Linear(self.in_features, self.out_features, device=device, dtype=dtype)
        # x needs its gradient, as every layer's input but the first in a model.
        self.x = torch.randn(self.tokens, self.in_features, device=device, dtype=dtype).requires_grad_()
        self.dy = torch.randn(self.tokens, self.out_features, device=device, dtype=dtype)

    def bare(self) -> nn.Linear:
        """A copy of the base, frozen."""
        return copy.deepcopy(self.base).requires_grad_(False)

    def ours(self, spec: Piece, lean: bool = False) -> nn.Module:
        """An AdaptedLinear."""
        return perturbed(AdaptedLinear(self.bare(), spec, lean=lean), self.options.seed)

    def all_of(self, specs: Mapping[str, Piece], lean: bool = False) -> dict[str, nn.Module]:
        """An AdaptedLinear for every spec, by name; the names of lean ones say so."""
        return {f"{name}, lean" if lean else name: self.ours(spec, lean) for name, spec in specs.items()}

    def peft(self, dora: bool = False, dropout: float = 0.0) -> nn.Module:
        """PEFT's layer of the same rank and scale, without PEFT's model around it."""
        holder = nn.Sequential(self.bare())
        inject_adapter_in_model(peft_config(["0"], self.rank, dora, dropout), holder)
        return perturbed(holder[0], self.options.seed)


def peft_config(targets: list[str], rank: int, dora: bool, dropout: float) -> LoraConfig:
    """PEFT's LoRA with scale 1, which is our default."""
    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, use_dora=dora, target_modules=targets)


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def perturbed(module: nn.Module, seed: int) -> nn.Module:
    """The module itself, with noise added to all that trains: nothing is zero or cancels because it has just begun."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in trained(module):
            parameter.add_(AWAY * torch.randn_like(parameter))
    return module
