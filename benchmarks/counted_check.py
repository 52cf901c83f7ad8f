"""The counters against cases whose answer is known by hand; every run of the benchmarks starts with them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.counted import alive_bytes, flops, saved_bytes

N, K, M = 6, 5, 4  # small sizes without a common factor that would hide a wrong one


class _Kept(torch.autograd.Function):
    """x W with W: [K, M]; keeps a half of its result on the context, unseen by autograd, and frees a temporary."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.half = (x @ weight).double()[: N // 2]  # a view: its whole storage stays
        ctx.save_for_backward(weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        total = torch.zeros(len(grad), K)
        total.addmm_(grad, weight.mT)
        return total, None


def _kept(x: Tensor, weight: Tensor) -> Tensor:
    return _Kept.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]


def check() -> None:
    """Raise an AssertionError if a counter does not give what it must."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for what, had, due in [*_flops(), *_alive(), *_saved()]:
            assert had == due, f"the counter of {what} gives {had}; it must be {due}"


def _flops() -> list[tuple[str, int, int]]:
    x, w, y = torch.randn(N, K), torch.randn(K, M), torch.randn(N, M)
    xs, ws, ys = (torch.randn(3, *t.shape) for t in (x, w, y))
    one = 2 * N * K * M
    ops: dict[str, tuple[Callable[[], object], int]] = {
        "mm": (lambda: x @ w, one),
        "mm, out": (lambda: torch.mm(x, w, out=y), one),
        "addmm": (lambda: torch.addmm(y, x, w), one),
        "addmm, out": (lambda: torch.addmm(y, x, w, out=y), one),
        "addmm_": (lambda: y.addmm_(x, w), one),
        "addmm with an activation": (lambda: torch._addmm_activation(y[0], x, w), one),
        "bmm": (lambda: xs @ ws, 3 * one),
        "baddbmm": (lambda: torch.baddbmm(ys, xs, ws), 3 * one),
        "baddbmm_": (lambda: ys.baddbmm_(xs, ws), 3 * one),
        "addbmm": (lambda: torch.addbmm(y, xs, ws), 3 * one),
        "addbmm_": (lambda: y.addbmm_(xs, ws), 3 * one),
        "einsum": (lambda: torch.einsum("nk,km->mn", x, w), one),
        "linear": (lambda: nn.functional.linear(x, w.mT, y[0]), one),
        "linear, one token": (lambda: nn.functional.linear(x[0], w.mT, y[0]), 2 * K * M),
        "mv": (lambda: x @ w[:, 0], 2 * N * K),
        "addmv": (lambda: torch.addmv(y[:, 0], x, w[:, 0]), 2 * N * K),
        "addmv_": (lambda: y[:, 0].addmv_(x, w[:, 0]), 2 * N * K),
        "dot": (lambda: x[0] @ w[:, 0], 2 * K),
        "addr": (lambda: torch.addr(y, x[:, 0], w[0]), 2 * N * M),
        "addr_": (lambda: y.addr_(x[:, 0], w[0]), 2 * N * M),
        "linear, forward and backward": (lambda: _backward(nn.Linear(K, M), x), 3 * one),
        "a Function, forward and backward": (lambda: _backward(lambda t: _kept(t, w), x), 3 * one),
        "no product": (lambda: x * 2, 0),
    }
    found = [(f"operations ({name})", flops(step), due) for name, (step, due) in ops.items()]
    with torch.inference_mode():
        return [*found, ("operations (inference)", flops(lambda: nn.functional.linear(x, w.mT)), one)]


def _backward(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    x = x.clone().requires_grad_()
    y = function(x)
    torch.autograd.backward(y, torch.ones_like(y))


def _alive() -> list[tuple[str, int, int]]:
    x, w = torch.randn(N, K), torch.randn(K, M, requires_grad=True)
    store: list[Tensor] = []

    def cycle() -> Tensor:
        ring: list[object] = [x.exp()]
        ring.append(ring)
        return x + 1

    def cached() -> Tensor:
        store.append(x.exp())
        return x + store[-1].mT.mT

    cases: dict[str, tuple[Callable[[], object], int]] = {
        "a freed temporary": (lambda: (x * 2) + 1, 0),
        "what is returned": (lambda: {"y": x * 2, "z": (x @ w.detach(),)}, 0),
        "a view of the input": (lambda: (x.mT, x[1:]), 0),
        "a saved intermediate": (lambda: (x @ w).exp().sum(), 4 * N * M),
        "a view that keeps a whole": (lambda: (torch.cat([x, x]) @ w)[:1], 4 * 2 * N * K),
        "a context's attribute": (lambda: _kept(x.requires_grad_(), w), 8 * N * M),
        "a mask": (lambda: torch.native_dropout(x.detach() @ w, 0.5, True)[0], N * M),
        "a relu": (lambda: (x.detach() @ w).relu(), 0),
        "a cache": (cached, 4 * N * K),
        "the same cache, made earlier": (lambda: store[0].mT + 1, 0),
        "torch.tensor": (lambda: store.append(torch.tensor([1.0, 2.0])), 8),
        "a cycle": (cycle, 4 * N * K),
    }
    return [(f"living bytes ({name})", alive_bytes(run, [x, w]), due) for name, (run, due) in cases.items()]


def _saved() -> list[tuple[str, int, int]]:
    x, w = torch.randn(N, K), torch.randn(K, M, requires_grad=True)
    cases: dict[str, tuple[Callable[[], object], int]] = {
        "input and parameter": (lambda: x @ w, 0),
        "an intermediate": (lambda: (x @ w).square().sum(), 4 * N * M),
        "the same one twice": (lambda: [a := x @ w, a.square() + a.sin()], 4 * N * M),
        "a graph that is dropped": (lambda: (x @ w).exp().sum().detach(), 0),
        "a context's attribute is not seen": (lambda: _kept(x.requires_grad_(), w), 0),
    }
    return [(f"saved bytes ({name})", saved_bytes(run, [x, w]), due) for name, (run, due) in cases.items()]


if __name__ == "__main__":
    check()
