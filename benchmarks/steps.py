"""What is run and timed: one training step, the same for both sides."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layers import Bench, trained

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


def products_alone(bench: Bench, dora: bool = False) -> Callable[[], None]:
    """The matrix products of LoRA's step, in place and in a row: no autograd, no optimiser, nothing else. A floor.

    With `dora` also what DoRA can't do without: the product W Vᵀ of its norm, and the passes y ∘ l and ∂y ∘ l.
    """
    W, x, dy = bench.base.weight.detach(), bench.x.detach(), bench.dy
    U, V, gain = torch.randn(len(W), bench.rank), torch.randn(bench.rank, W.shape[1]), torch.rand(len(W))

    def step() -> None:
        y = x @ W.mT if dora else torch.nn.functional.linear(x, W, bench.base.bias.detach())
        if dora:
            W @ V.mT
            y = y * gain
        h = x @ V.mT
        y.addmm_(h, U.mT)
        dh = dy @ U
        h.mT @ dy
        dh.mT @ x
        dx = (dy * gain if dora else dy) @ W
        dx.addmm_(dh, V)

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
