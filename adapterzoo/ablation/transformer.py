"""The base model: a transformer of two blocks, small enough to train in seconds on one core."""

from collections.abc import Mapping

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from adapterzoo.ablation.digits import CLASSES, Images, old_digits
from adapterzoo.streams import stream

WIDTH, BLOCKS, HEADS, PATCH = 64, 2, 4, 2
TOKENS = (8 // PATCH) ** 2

State = Mapping[str, NDArray[np.float32]]
"""The weights of a backbone, by name: plain arrays, which travel between processes by value."""


class Attention(nn.Module):
    """Self-attention of plain linear layers: nn.MultiheadAttention reads its weights itself, past any adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, width] -> [n, tokens, width]."""
        q, k, v = (
            rearrange(layer(x), "n tokens (heads d) -> n heads tokens d", heads=HEADS)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.o_proj(rearrange(mixed, "n heads tokens d -> n tokens (heads d)"))
        return out


class Block(nn.Module):
    """Attention and a perceptron, each on a normalised input and beside a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, width] -> [n, tokens, width]."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.down_proj(F.gelu(self.up_proj(self.norm2(x))))
        return out


class Backbone(nn.Module):
    """Everything below the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(TOKENS, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, 8, 8] -> [n, width]."""
        patches = rearrange(pixels, "n (y b) (x c) -> n (y x) (b c)", b=PATCH, c=PATCH)
        tokens: Tensor = self.norm(self.blocks(self.embed(patches) + self.positions))
        return tokens.mean(dim=1)


class Classifier(nn.Module):
    """A backbone under a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, 8, 8] -> [n, classes]."""
        logits: Tensor = self.head(self.backbone(pixels))
        return logits


def new_model(seed: int, base: State | None = None) -> Classifier:
    """A classifier on a pretrained base (on random weights without one), its head drawn from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier()
    if base is not None:
        model.backbone.load_state_dict({name: torch.from_numpy(value) for name, value in base.items()})
    with torch.no_grad():
        model.head.weight.normal_(std=WIDTH**-0.5, generator=stream("head", seed))
        model.head.bias.zero_()
    return model


def pretrain(steps: int = 300, batch: int = 64, seed: int = 0) -> State:
    """Train a whole model on the digits 0 to 4, and give back its backbone's weights."""
    model = new_model(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for images in batches(old_digits(), batch, steps, stream("pretraining", seed)):
        descend(model, images, optimiser)
        schedule.step()
    return weights(model.backbone)


def weights(backbone: Backbone) -> State:
    """The weights of a backbone as they are now; later steps do not change what is given back."""
    return {name: value.numpy().copy() for name, value in backbone.state_dict().items()}


def batches(images: Images, size: int, steps: int, order: torch.Generator) -> list[Images]:
    """As many batches as steps, pass after pass over the images, each pass in an order of its own."""
    per_pass = len(images) // size
    passes = (torch.randperm(len(images), generator=order) for _ in range(-(-steps // per_pass)))
    return [images.pick(part[i * size : (i + 1) * size]) for part in passes for i in range(per_pass)][:steps]


def descend(model: nn.Module, images: Images, optimiser: torch.optim.Optimizer) -> float:
    """One step on the cross-entropy; gives back the loss before it."""
    optimiser.zero_grad()
    loss = F.cross_entropy(model(images.pixels), images.labels)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return loss.item()
