"""What is run and timed: one training step, the same for both sides."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layers import trained

RATE = 1e-5


def training_step(module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward, backward with the gradient dy, one fused AdamW step over the adapter, gradients dropped.

    Where x requires a gradient it is formed, as in every layer of a model but the first.
    """
    return model_step(module, lambda: module(x), dy, x)


def model_step(module: nn.Module, forward: Callable[[], Tensor], dy: Tensor, *inputs: Tensor) -> Callable[[], None]:
    """The same for a whole model, whose forward gives one tensor of dy's shape."""
    module.train()
    optimiser = torch.optim.AdamW(trained(module), lr=RATE, fused=True)

    def step() -> None:
        torch.autograd.backward(forward(), dy)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        for tensor in inputs:
            tensor.grad = None

    return step


def evaluation(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward in evaluation, without gradients."""
    module.eval()
    x = x.detach()

    def step() -> None:
        with torch.no_grad():
            module(x)

    return step


def constants(module: nn.Module, *further: Any) -> list[Tensor]:
    """What a forward is given and does not make: parameters, buffers and the inputs."""
    return [*module.parameters(), *module.buffers(), *further]
