"""Precision and memory: what people switch on in training, under every kind of composition, with ranks allocated."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import adapterzoo as az
from adapterzoo import MAP, SORA, AdaLoRA, DoRA, FLoRA, Full, LoRA, PreDiag
from adapterzoo.pieces import Role

ADA = AdaLoRA(r=4, alpha=6, target_r=2, t_final=5)
SPECS = [
    LoRA(r=3, alpha=2),
    LoRA(r=3, dropout=0.2),
    ADA,
    MAP(ADA),
    MAP(DoRA(ADA)),
    SORA(PreDiag(FLoRA(r=(3, 2))), rank=2),
    MAP(Full()),
]
STEPS = 25


class Blocks(nn.Module):
    """Two residual blocks, each of which may be checkpointed."""

    def __init__(self, spec, how=None, dtype=torch.float32, adapter_dtype=None):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Dropout(0.1), nn.Linear(20, 12, bias=False))
            for _ in range(2)
        )
        self.head = nn.Linear(12, 6)
        self.how = how
        self.to(dtype)
        az.adapt(self, spec, train=["head"], adapter_dtype=adapter_dtype)

    def forward(self, x):
        if self.how is not None:
            x = x.requires_grad_()  # reentrant checkpoints need an input that wants a gradient: torch's rule
        for block in self.blocks:
            x = x + (block(x) if self.how is None else checkpoint(block, x, use_reentrant=self.how))
        return self.head(x)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def batch(t, dtype=torch.float32):
    draw = torch.Generator().manual_seed(t)
    x = torch.randn(24, 12, generator=draw)
    goal = torch.randn(12, 6, generator=torch.Generator().manual_seed(999))
    return x.to(dtype), (x @ goal).to(dtype)


def train(model, optimiser, steps=STEPS, autocast=None, scaler=None, clip=None):
    """The losses, in float32."""
    torch.manual_seed(5)
    az.attach(model, optimiser, total_steps=steps)
    losses = []
    for t in range(steps):
        x, y = batch(t, model.head.weight.dtype)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = (model(x).float() - y.float()).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(trained(model), clip, error_if_nonfinite=scaler is None)
        if scaler is None:
            optimiser.step()
        else:
            scaler.step(optimiser)
            scaler.update()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model, **options):
    return torch.optim.AdamW(trained(model), lr=1e-2, **options)


def total(model):
    return sum(az.ranks(model).values())


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_checkpointed_training_is_the_same_bit_for_bit(spec, reentrant):
    plain, saving = Blocks(spec), Blocks(spec, how=reentrant)
    losses = train(plain, adamw(plain), steps=8)
    assert train(saving, adamw(saving), steps=8) == losses
    assert all(a.equal(b) for a, b in zip(plain.state_dict().values(), saving.state_dict().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_autocast_trains_as_float32_does(spec, dtype):
    """With a GradScaler for float16. Every parameter and gradient stays float32, the budget is met, the loss alike."""
    wide, narrow = Blocks(spec), Blocks(spec)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if dtype is torch.float16 else None
    expected = train(wide, adamw(wide), clip=1.0)
    losses = train(narrow, adamw(narrow), autocast=dtype, scaler=scaler, clip=1.0)
    assert {p.dtype for p in narrow.parameters()} == {torch.float32}
    assert losses[-1] < 0.8 * losses[0]
    assert losses == pytest.approx(expected, rel=0.05)
    assert losses != expected
    if "AdaLoRA" in repr(spec):
        assert total(narrow) == 8


@pytest.mark.parametrize("adapter_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_a_16_bit_model_trains_with_magnitudes_in_float32(spec, adapter_dtype):
    model = Blocks(spec, dtype=torch.bfloat16, adapter_dtype=adapter_dtype)
    losses = train(model, adamw(model))
    assert losses[-1] < 0.85 * losses[0]
    for layer in az.adapted_layers(model).values():
        assert layer.weight.dtype is torch.bfloat16
        for part in layer.adapter.parts():
            for name, value in part.values().items():
                fine = part.spec.roles[name] in (Role.MAGNITUDE, Role.ROTATION, Role.BUFFER)
                assert value.dtype is (torch.float32 if fine or adapter_dtype is None else torch.bfloat16), name
    if "AdaLoRA" in repr(spec):
        assert total(model) == 8


def test_magnitudes_in_float32_take_steps_that_16_bits_would_lose():
    """A step of 1e-4 of a magnitude near 1: bf16 has 3 digits there."""
    model = Blocks(MAP(DoRA(LoRA(r=3))), dtype=torch.bfloat16)
    optimiser = torch.optim.AdamW(trained(model), lr=1e-4, weight_decay=0.0)
    adapter = model.blocks[0][0].adapter
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    with torch.no_grad():
        adapter.inner.inner.B.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    train(model, optimiser, steps=1)
    for name in ("alpha", "inner.magnitude"):
        moved = (adapter.state_dict()[name] - before[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-4), rtol=0.05, atol=0)
        assert before[name].bfloat16().equal((before[name] + 1e-4).bfloat16()) or name != "alpha"


@pytest.mark.parametrize("spec", [MAP(ADA), DoRA(LoRA(r=3)), SORA(PreDiag(ADA), rank=2)], ids=repr)
def test_foreach_and_fused_steps_are_the_plain_ones(spec):
    plain = Blocks(spec)
    expected = train(plain, adamw(plain, foreach=False), clip=0.5)
    for options in ({"foreach": True}, {"fused": True}):
        other = Blocks(spec)
        assert train(other, adamw(other, **options), clip=0.5) == pytest.approx(expected, rel=1e-3)
        assert az.ranks(other) == az.ranks(plain)


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_sgd_trains(spec):
    model = Blocks(spec)
    losses = train(model, torch.optim.SGD(trained(model), lr=0.1, momentum=0.9), clip=1.0)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("spec", [MAP(ADA), DoRA(LoRA(r=3, dropout=0.2))], ids=repr)
def test_accumulation_over_checkpoints_and_autocast(spec):
    """Everything at once, against the same without checkpoints: bit for bit."""
    ends = []
    for how in (None, True, False):
        model = Blocks(spec, how=how)
        optimiser = adamw(model, fused=True)
        az.attach(model, optimiser, total_steps=6)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        torch.manual_seed(9)
        for t in range(6):
            for part in (slice(0, 10), slice(10, None)):
                x, y = batch(t)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = (model(x[part]).float() - y[part]).square().mean() / 2
                scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad()
        ends.append(list(model.state_dict().values()))
    for other in ends[1:]:
        assert all(a.equal(b) for a, b in zip(ends[0], other, strict=True))


# Dynamo warns about every autograd.Function that it traces, and torch about jit in its own code.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_needs_no_new_graph_when_masks_change():
    torch._dynamo.reset()
    ends = []
    for compiled in (False, True):
        model = Blocks(MAP(ADA)).eval()  # without dropout: a graph draws it otherwise
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimiser = adamw(model)
        az.attach(model, optimiser, total_steps=12)
        for t in range(12):
            x, y = batch(t)
            with torch._dynamo.config.patch(error_on_recompile=t > 0):
                (call(x) - y).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        ends.append(model)
    assert az.ranks(ends[0]) == az.ranks(ends[1])
    assert total(ends[1]) == 8
    for a, b in zip(ends[0].state_dict().values(), ends[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_optimiser_does_what_pieces_need():
    torch._dynamo.reset()
    model = Blocks(ADA)
    optimiser = adamw(model)
    attachment = az.attach(model, optimiser, total_steps=10)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step, counts = torch.compile(optimiser.step, backend=backend), []
    for t in range(10):
        x, y = batch(t)
        (model(x) - y).square().mean().backward()
        step()
        optimiser.zero_grad()
        counts.append(len(graphs))
    assert attachment.step == 10
    assert total(model) == 8
    assert counts[2] == counts[-1]  # nothing is compiled anew while the budget falls
