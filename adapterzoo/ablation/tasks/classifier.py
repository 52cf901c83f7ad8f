"""What the two models of the digits have in common: a backbone under a linear head."""

import torch
from torch import Tensor, nn

from adapterzoo.streams import stream

WIDTH = 64


class Classifier(nn.Module):
    """A backbone under a linear head.

    Args:
        backbone: maps images [n, 8, 8] to features [n, 64].
        classes: how many there are.
    """

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, 8, 8] -> [n, classes]."""
        logits: Tensor = self.head(self.backbone(pixels))
        return logits

    @torch.no_grad()
    def draw_head(self, seed: int) -> None:
        """Give the head its first values: from the seed alone."""
        self.head.weight.normal_(std=WIDTH**-0.5, generator=stream("head", seed))
        self.head.bias.zero_()
