"""A convolutional network of three convolutions, without norms over the batch: it treats images one by one."""

from torch import Tensor, nn
from torch.nn import functional as F

from adapterzoo.ablation.tasks.classifier import WIDTH

ADAPTED = ("conv2", "conv3", "project")
"""What is adapted by default; the first convolution has one channel in, too few for a factor of it."""


class ConvNet(nn.Module):
    """Three convolutions, the mean over what is left of the image, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, WIDTH // 4, 3, padding=1)
        self.conv2 = nn.Conv2d(WIDTH // 4, WIDTH // 2, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(WIDTH // 2, WIDTH, 3, padding=1)
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, 8, 8] -> [n, width]."""
        x = F.gelu(self.conv1(pixels[:, None]))
        x = F.gelu(self.conv3(F.gelu(self.conv2(x))))
        return F.gelu(self.project(x.mean(dim=(2, 3))))
