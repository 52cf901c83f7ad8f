"""Layers of every kind, drawn by hypothesis, and what they compute by an independent dense reference."""

import copy
from dataclasses import dataclass, field
from math import prod

import torch
from hypothesis import assume
from hypothesis import strategies as st
from reference import adapted, tree_of
from strategies import overflows, perturb, wrappers
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from adapterzoo import AdaLoRA, AdaptedLinear, FLoRA, Full, LoRA
from adapterzoo.pieces import Piece

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class LayerCase:
    """One drawn layer; print it and paste it."""

    kind: str
    arguments: tuple
    options: dict = field(hash=False)
    spec: Piece
    lead: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    strength: float = 0.3
    seed: int = 0
    family: str = "plain"

    def draw(self, what):
        return torch.Generator().manual_seed(1000 * self.seed + what)

    def plain(self):
        """The plain layer, with weights from the seed."""
        made = {
            "conv": lambda: CONVOLUTIONS[self.dims](*self.arguments, **self.options),
            "transposed": lambda: Conv1D(*self.arguments),
            "embedding": lambda: nn.Embedding(*self.arguments, **self.options),
        }[self.kind]()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=self.draw(1), dtype=torch.float64))
        return made.to(self.dtype)

    @property
    def dims(self):
        return len(self.arguments[2])

    def layer(self, perturbed=True):
        layer = AdaptedLinear(self.plain(), self.spec, seed=self.seed)
        if perturbed:
            perturb(layer, self.strength, self.draw(2))
        return layer

    def input(self):
        if self.kind == "embedding":
            return torch.randint(0, self.arguments[0], self.lead, generator=self.draw(3))
        width = self.arguments[1] if self.kind == "transposed" else None
        shape = (*self.lead, width) if width else self.lead
        return torch.randn(shape, generator=self.draw(3), dtype=torch.float64).to(self.dtype)

    def stored(self, matrix, like):
        """A matrix [out, in] in the layout of the layer's weight."""
        return matrix.reshape(like.shape) if self.kind == "conv" else matrix.T

    def matrix(self, weight):
        return weight.flatten(1) if self.kind == "conv" else weight.T


class LayerTruth:
    """What the dense reference says, in float64, through the plain layer's own forward on the effective weight."""

    def __init__(self, case, layer):
        self.case, self.plain = case, copy.deepcopy(case.plain()).double()
        self.W = case.matrix(layer.weight.detach().double())
        tree, self.leaves = tree_of(layer.adapter)
        node = adapted(self.W, tree)
        assume(node.kappa < (1e12 if case.dtype is torch.float64 else 1e3))
        self.kappa, self.part, self.weight = node.kappa, node.part, self.W + node.update
        self.update = node.update
        places = prod(case.arguments[2]) ** 0.5 * 3**case.dims if case.kind == "conv" else 1.0
        self.scale = (size(self.W) + size(node.mass)) * node.kappa * places

    def forward(self, x, matrix=None, bias=True):
        weight = self.case.stored(self.weight if matrix is None else matrix, self.plain.weight)
        values = {"weight": weight}
        if not bias and getattr(self.plain, "bias", None) is not None:
            values["bias"] = torch.zeros_like(self.plain.bias)
        return functional_call(self.plain, values, (x if x.dtype == torch.int64 else x.double(),))

    def output_scale(self, x):
        inputs = x.numel() ** 0.5 if x.dtype == torch.int64 else size(x)
        own = getattr(self.plain, "bias", None)
        return inputs * self.scale + (0.0 if own is None else size(own) * max(1, x.numel()) ** 0.5)


def size(value):
    return float(torch.linalg.vector_norm(value.detach().to(torch.float64)))


@st.composite
def generators(draw, out, cols, kernel=(), dropout=0.0):
    ranks = st.integers(1, min(out, cols))
    channels = cols // prod(kernel)
    pair = st.tuples(st.integers(1, out), st.integers(1, channels))
    modes = st.tuples(st.integers(1, out), st.integers(1, channels), *(st.integers(1, size) for size in kernel))
    scales = st.sampled_from([1.0, 0.25, 4.0])
    return draw(
        st.one_of(
            st.builds(LoRA, r=ranks, alpha=st.sampled_from([0.5, 3.0, 16.0]), dropout=st.just(dropout)),
            st.builds(AdaLoRA, r=ranks, alpha=st.sampled_from([0.5, 3.0, 16.0]), dropout=st.just(dropout)),
            st.builds(FLoRA, r=st.one_of(pair, modes), scale=scales, dropout=st.just(dropout)),
            *([] if dropout else [st.just(Full())]),
        )
    )


@st.composite
def composed(draw, out, cols, kernel=(), dropout=0.0, depth=3):
    spec = draw(generators(out, cols, kernel, dropout))
    for wrap in draw(st.lists(wrappers(out), max_size=depth)):
        spec = wrap(spec)
    return spec


@st.composite
def convolutions(draw, dropout=0.0, **options):
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inside, outside = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    if draw(st.booleans()) and groups > 1:
        inside = groups  # depthwise
    kernel = tuple(draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims)))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.one_of(st.integers(0, 2), st.just("same"), st.just("valid")))
    stride = 1 if padding == "same" else tuple(draw(st.lists(st.integers(1, 2), min_size=dims, max_size=dims)))
    chosen = {
        "stride": stride, "padding": padding, "dilation": draw(st.integers(1, 2)), "groups": groups,
        "bias": draw(st.booleans()), "padding_mode": mode,
    }  # fmt: skip
    spec = draw(composed(outside, inside // groups * prod(kernel), kernel, dropout))
    lead = (*draw(st.sampled_from([(2,), (1,), ()])), inside, *([6] * dims))
    return _case(draw, "conv", (inside, outside, kernel), chosen, spec, lead, options)


@st.composite
def transposed(draw, dropout=0.0, **options):
    out, cols = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    lead = draw(st.sampled_from([(3,), (2, 3)]))
    return _case(draw, "transposed", (out, cols), {}, draw(composed(out, cols, (), dropout)), lead, options)


@st.composite
def embeddings(draw, dropout=0.0, **options):
    entries, dimensions = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    padding = draw(st.one_of(st.none(), st.integers(0, entries - 1)))
    spec = draw(composed(dimensions, entries, (), dropout))
    lead = draw(st.sampled_from([(3,), (2, 3), ()]))
    return _case(draw, "embedding", (entries, dimensions), {"padding_idx": padding}, spec, lead, options)


def _case(draw, kind, arguments, chosen, spec, lead, options):
    case = LayerCase(
        kind, arguments, chosen, spec, lead,
        strength=draw(st.sampled_from([0.3, 3.0])), seed=draw(st.integers(0, 2**16)), **options,
    )  # fmt: skip
    assume(not overflows(case))
    return case


def layers(**options):
    """Layers of every kind that is no nn.Linear."""
    return st.one_of(convolutions(**options), convolutions(**options), transposed(**options), embeddings(**options))
