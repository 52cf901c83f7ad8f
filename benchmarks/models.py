"""Whole models with random weights, adapted by us and by PEFT in exactly the same layers."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model, LlamaConfig, LlamaModel

from adapterzoo import adapt, adapted_layers
from adapterzoo.pieces import Piece
from benchmarks.counted import alive_bytes, saved_bytes
from benchmarks.layers import peft_config, perturbed
from benchmarks.options import Options
from benchmarks.paired import Step
from benchmarks.steps import constants, model_step


def deberta(layers: int) -> nn.Module:
    """DeBERTaV3-base as its configuration says, but for the number of layers."""
    model: nn.Module = DebertaV2Model(
        DebertaV2Config(
            vocab_size=128100, hidden_size=768, num_hidden_layers=layers, num_attention_heads=12,
            intermediate_size=3072, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
            relative_attention=True, position_buckets=256, max_relative_positions=-1, position_biased_input=False,
            norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type="p2c|c2p", attn_implementation="eager",
        )
    )  # fmt: skip
    return model


def llama(layers: int, hidden: int = 1024, intermediate: int = 2816, heads: int = 16) -> nn.Module:
    """A stack of Llama's blocks with a small vocabulary, which no adapter touches."""
    model: nn.Module = LlamaModel(
        LlamaConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=intermediate,
            vocab_size=1000, use_cache=False, attn_implementation="sdpa",
        )
    )  # fmt: skip
    return model


@dataclass
class ModelBench:
    """One model, token ids and a gradient of its last hidden state; adapted copies share the frozen weights.

    Attributes:
        build: makes the model.
        shape: (batch, length) of the token ids.
        hidden: the model's width.
        rank: of every adapter, ours and PEFT's.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, int]
    hidden: int
    options: Options
    rank: int
    base: nn.Module = field(init=False)
    ids: Tensor = field(init=False)
    dy: Tensor = field(init=False)
    targets: list[str] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.options.seed)
        self.base = self.build().to(self.options.device).requires_grad_(False)
        self.ids = torch.randint(0, 1000, self.shape, device=self.options.device)
        self.dy = torch.randn(*self.shape, self.hidden, device=self.options.device)
        self.targets = [name for name, module in self.base.named_modules() if isinstance(module, nn.Linear)]

    def twin(self) -> nn.Module:
        """A copy of the model that shares its frozen parameters and has modules of its own."""
        return copy.deepcopy(self.base, {id(parameter): parameter for parameter in self.base.parameters()})

    def ours(self, spec: Piece, lean: bool = False) -> nn.Module:
        """Every linear layer adapted by us."""
        model = self.twin()
        adapt(model, spec, self.targets, seed=self.options.seed, lean=lean)
        assert list(adapted_layers(model)) == self.targets
        return perturbed(model, self.options.seed)

    def all_of(self, specs: Mapping[str, Piece], lean: bool = False) -> dict[str, nn.Module]:
        """A model for every spec, by name; the names of lean ones say so."""
        return {f"{name}, lean" if lean else name: self.ours(spec, lean) for name, spec in specs.items()}

    def peft(self, dora: bool = False) -> nn.Module:
        """Every linear layer adapted by PEFT, without PEFT's model around it."""
        model = inject_adapter_in_model(peft_config(self.targets, self.rank, dora, 0.0), self.twin())
        assert [name for name, module in model.named_modules() if isinstance(module, LoraLayer)] == self.targets
        return perturbed(model, self.options.seed)

    def steps(self, models: Mapping[str, nn.Module]) -> dict[str, Step]:
        """A training step of every model."""
        return {name: model_step(model, self._forward(model), self.dy) for name, model in models.items()}

    def bytes_of(self, model: nn.Module) -> dict[str, int]:
        """What one forward in training leaves behind, counted in two ways."""
        model.train()
        counts = {"saved by autograd": saved_bytes, "alive after forward": alive_bytes}
        given = constants(model, self.ids)
        return {name: count(self._forward(model), given) for name, count in counts.items()}

    def _forward(self, model: nn.Module) -> Callable[[], Tensor]:
        return lambda: model(input_ids=self.ids).last_hidden_state
