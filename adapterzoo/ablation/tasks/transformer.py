"""A transformer of two blocks, small enough to train in seconds on one core."""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from adapterzoo.ablation.tasks.classifier import WIDTH

BLOCKS, HEADS, PATCH = 2, 4, 2
TOKENS = (8 // PATCH) ** 2


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


class Transformer(nn.Module):
    """Patches of 2 x 2 pixels as tokens, two blocks, and the mean over tokens."""

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
