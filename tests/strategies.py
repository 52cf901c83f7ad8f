"""What hypothesis draws: structure (shapes, ranks, dtypes, composition trees, a seed). Values come from the seed."""

from dataclasses import dataclass

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

from adapterzoo import MAP, SORA, AdaLoRA, AdaptedLinear, DoRA, FLoRA, Full, LoRA, PreDiag
from adapterzoo.pieces import Piece, Wrapper

FAMILIES = ("plain", "zero rows", "duplicate rows", "rank one", "tiny", "huge", "zero")
STRENGTHS = (3e-3, 0.3, 10.0)


@dataclass(frozen=True)
class Case:
    """One drawn layer; print it and paste it."""

    spec: Piece
    out: int
    cols: int
    lead: tuple[int, ...] = (3,)
    bias: bool = True
    dtype: torch.dtype = torch.float64
    family: str = "plain"
    strength: float = 0.3
    seed: int = 0


def sizes():
    return st.one_of(st.integers(1, 9), st.sampled_from([1, 12]))


def generators(out: int, cols: int, dropout: float = 0.0, full: bool = True):
    ranks = st.integers(1, min(out, cols))
    alphas = st.sampled_from([None, 0.5, 3.0, 16.0])
    options = [
        st.builds(LoRA, r=ranks, alpha=alphas, rslora=st.booleans(), dropout=st.just(dropout)),
        st.builds(AdaLoRA, r=ranks, alpha=alphas, dropout=st.just(dropout)),
        st.builds(
            FLoRA,
            r=st.tuples(st.integers(1, out), st.integers(1, cols)),
            scale=st.sampled_from([1.0, 0.25, 4.0]),
            dropout=st.just(dropout),
        ),
    ]
    return st.one_of(*options, *([st.just(Full())] if full else []))


def wrappers(out: int):
    """Strategies of functions inside -> wrapped."""
    ranks = st.integers(1, min(out, 3))
    return st.one_of(
        st.tuples(st.sampled_from([1e-2, 0.3, "literal"]), st.sampled_from(["matrix", "channel"])).map(
            lambda t: lambda inner: MAP(inner, floor=t[0], per=t[1])
        ),
        st.booleans().map(lambda detach: lambda inner: DoRA(inner, detach_norm=detach)),
        st.just(PreDiag),
        st.tuples(ranks, st.sampled_from(["cayley", "exp", "first_order"]), st.sampled_from([None, 1.0, 0.4])).map(
            lambda t: lambda inner: SORA(inner, rank=t[0], map=t[1], damping=t[2])
        ),
    )


@st.composite
def specs(draw, out: int, cols: int, depth: int = 6, dropout: float = 0.0, full: bool = True):
    spec = draw(generators(out, cols, dropout, full))
    for wrap in draw(st.lists(wrappers(out), max_size=depth)):
        spec = wrap(spec)
    return spec


@st.composite
def cases(draw, dtypes=(torch.float64,), families=FAMILIES, strengths=STRENGTHS, dropouts=(0.0,), full=True, depth=6):
    out, cols = draw(sizes()), draw(sizes())
    case = Case(
        spec=draw(specs(out, cols, depth, draw(st.sampled_from(list(dropouts))), full)),
        out=out,
        cols=cols,
        lead=draw(st.sampled_from([(3,), (), (2, 3), (0,), (2, 1, 2)])),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(list(dtypes))),
        family=draw(st.sampled_from(list(families))),
        strength=draw(st.sampled_from(list(strengths))),
        seed=draw(st.integers(0, 2**16)),
    )
    assume(not overflows(case))
    return case


def far(dtype: torch.dtype) -> float:
    """A scale far from one."""
    return 1e12 if dtype is torch.float64 else 1e6


def overflows(case: Case) -> bool:
    """Whether nested MAPs below their floors, each a gain of 1 / (floor ‖W‖), leave float32's range by definition."""
    gain, spec = 1.0, case.spec
    while isinstance(spec, Wrapper):
        if isinstance(spec, MAP):
            gain *= 1e6 if spec.floor == "literal" else 1e2 * (far(case.dtype) if case.family == "tiny" else 1.0)
        spec = spec.inner
    return gain > 1e30


def stream(case: Case, what: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * case.seed + what)


def base_of(case: Case) -> nn.Linear:
    """The base layer of a case, in its dtype."""
    draw = stream(case, 1)
    W = 0.5 * torch.randn(case.out, case.cols, generator=draw, dtype=torch.float64)
    if case.family == "zero rows":
        W[torch.rand(case.out, generator=draw) < 0.5] = 0
    elif case.family == "duplicate rows":
        W = W[:1].repeat(case.out, 1)
    elif case.family == "rank one":
        W = torch.outer(W[:, 0], W[0])
    elif case.family == "zero":
        W.zero_()
    W *= {"tiny": 1 / far(case.dtype), "huge": far(case.dtype)}.get(case.family, 1.0)
    base = nn.Linear(case.cols, case.out, bias=case.bias, dtype=case.dtype)
    with torch.no_grad():
        base.weight.copy_(W)
        if case.bias:
            base.bias.copy_(torch.randn(case.out, generator=draw, dtype=torch.float64))
    return base


def layer_of(case: Case, perturbed: bool = True) -> AdaptedLinear:
    """The adapted layer of a case, every trainable parameter away from its start unless told otherwise."""
    layer = AdaptedLinear(base_of(case), case.spec, seed=case.seed)
    if perturbed:
        perturb(layer, case.strength, stream(case, 2))
    return layer


def perturb(layer: AdaptedLinear, strength: float, draw: torch.Generator) -> None:
    """Move every parameter: in proportion to its own size, or to the base's where it starts at zero."""
    unit = _rms(layer.weight) or 1.0
    with torch.no_grad():
        for name, value in layer.adapter.state_dict().items():
            noise = torch.randn(value.shape, generator=draw, dtype=torch.float64)
            if name.endswith("mask"):
                value.copy_((noise < 0.7).to(value.dtype))
                continue
            size = _rms(value)
            value.add_((0.3 * size if size > 0 else strength * unit) * noise.to(value.dtype))


def input_of(case: Case) -> torch.Tensor:
    return torch.randn(*case.lead, case.cols, generator=stream(case, 3), dtype=torch.float64).to(case.dtype)


def functional_of(case: Case) -> torch.Tensor:
    """A random functional of the output, so that every output counts with another weight."""
    return torch.randn(*case.lead, case.out, generator=stream(case, 4), dtype=torch.float64)


def _rms(value: torch.Tensor) -> float:
    return float(value.detach().to(torch.float64).square().mean().sqrt()) if value.numel() else 0.0
