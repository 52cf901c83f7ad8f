"""torch.compile: one graph for every pair, none compiled anew after the second step, and what eager mode computes."""

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from adapterzoo import MAP, SORA, AdaLoRA, DoRA, FLoRA, Full, LoRA, PreDiag, adapt

GENERATORS = (LoRA(r=3, alpha=2), LoRA(r=3, dropout=0.3), AdaLoRA(r=3), FLoRA(r=(2, 3)), Full())
WRAPPERS = (
    lambda generator: generator,
    MAP,
    DoRA,
    lambda generator: DoRA(generator, detach_norm=False),
    PreDiag,
    SORA,
    lambda generator: SORA(generator, map="exp"),
    lambda generator: SORA(generator, map="first_order", damping=1.0),
)
PAIRS = [wrap(generator) for generator in GENERATORS for wrap in WRAPPERS]
DEEP = [DoRA(SORA(MAP(PreDiag(DoRA(MAP(LoRA(r=3))))))), MAP(DoRA(AdaLoRA(r=2))), SORA(PreDiag(FLoRA(r=2)))]

# Dynamo warns about every autograd.Function that it traces, and torch about jit in its own code.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def model_of(spec, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)).to(dtype)
    adapt(model, spec, targets="all-linear")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def steps(model, call, count, dtype=torch.float32):
    """Losses of training steps with one AdamW; from the third on, compiling anew is an error."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for number in range(count):
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(number)).to(dtype).requires_grad_()
        torch.manual_seed(number)
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            loss = call(x).float().square().sum()
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        losses.append(torch.stack([loss.detach(), x.grad.float().norm()]))
    return torch.stack(losses)


def compare(spec, backend, dtype=torch.float32, tolerance=1e-5):
    eager, compiled = model_of(spec, dtype), model_of(spec, dtype)
    if "dropout" in repr(spec):  # masks are drawn otherwise in a graph; another test trains with them
        eager.eval()
        compiled.eval()
    call = torch.compile(compiled, backend=backend, fullgraph=True)
    mine, true = steps(compiled, call, 4, dtype), steps(eager, eager, 4, dtype)
    torch.testing.assert_close(mine, true, rtol=tolerance, atol=tolerance)
    pairs = zip(compiled.parameters(), eager.parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("spec", PAIRS + DEEP, ids=repr)
def test_every_pair_is_one_graph(spec):
    compare(spec, "aot_eager")


@pytest.mark.parametrize("spec", [LoRA(r=3), DEEP[0]], ids=repr)
def test_16_bits_too(spec):
    compare(spec, "aot_eager", torch.bfloat16, tolerance=3e-2)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor needs a C++ compiler for a CPU")
@pytest.mark.parametrize("spec", [MAP(LoRA(r=3)), DoRA(AdaLoRA(r=3)), SORA(PreDiag(LoRA(r=3)))], ids=repr)
def test_three_by_inductor(spec):
    compare(spec, "inductor", tolerance=1e-4)


@pytest.mark.parametrize("spec", [LoRA(r=3, dropout=0.5), DoRA(LoRA(r=3, dropout=0.5))], ids=repr)
def test_dropout_trains_in_a_graph(spec):
    """The mean over many masks is the evaluation forward, and gradients arrive."""
    model = model_of(spec)
    call = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    x = torch.ones(4000, 6)
    y = call(x)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in model[0].adapter.parameters())
    spread = y.std(dim=0) / len(x) ** 0.5
    assert (spread > 0).all()
    torch.testing.assert_close((y.mean(dim=0) - model[0].eval()(x)[0]).abs() / spread, torch.zeros(5), rtol=0, atol=4.5)


def test_evaluation_and_modes_compile_too():
    """Training, evaluation and no_grad are graphs of their own; going back to one compiles nothing."""
    model = model_of(DEEP[0])
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(7, 6)
    for turn in range(3):
        with torch._dynamo.config.patch(error_on_recompile=turn > 0):
            y = call(x)
            y.sum().backward()
            model.zero_grad()
            with torch.no_grad():
                torch.testing.assert_close(call(x), y)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # the base too: a compiled graph keeps nothing of it
        torch.testing.assert_close(call(x), model(x))


def test_lean_is_no_error_in_a_graph():
    gradients = []
    for compiled in (False, True):
        model = model_of(DoRA(LoRA(r=2)))
        for layer in (model[0], model[2]):
            layer.lean = True
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        call(torch.ones(3, 6)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 6
    for eager, graph in zip(*gradients, strict=True):
        torch.testing.assert_close(graph, eager)


def test_a_second_derivative_through_a_graph_is_torchs_error():
    model = model_of(LoRA(r=2))
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 6, requires_grad=True)
    (dx,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.square().sum().backward()
