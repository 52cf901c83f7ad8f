"""One case of a check: a composition on a small layer, with values from a seed."""

from dataclasses import dataclass, fields, replace
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from adapterzoo.base import WeightShape
from adapterzoo.forms import form_of
from adapterzoo.kept import NormCache
from adapterzoo.layer import AdaptedLinear
from adapterzoo.pieces import Piece, Role, layers_of
from adapterzoo.registry import from_json, parse, pieces, to_json
from adapterzoo.site import Site
from adapterzoo.testing.layers import LAYERS, Place

NAME = "checked"
"""The name of the layer, for messages and streams of random numbers."""


@dataclass(frozen=True, repr=False)
class Case:
    """A composition on one layer. `repr` pastes back, and the same case gives the same bits.

    Args:
        spec: the composition, its text, or its JSON.
        layer: "linear", "transposed", "convolution", "embedding" or "quantised".
        shape: (out, in), or of a convolution (out, in/groups, height, width).
        bias: whether the layer has a bias, where it can have one.
        stride: of a convolution.
        padding: of a convolution.
        groups: of a convolution.
        dtype: of the weight, as torch calls it.
        family: of the weight's values: "plain", or "zero row" for one whose first row is zero.
        seed: what every value comes from.

    Example:
        >>> from adapterzoo.testing import Case
        >>> Case("LoRA(r=2)", shape=(5, 3), seed=1)
        Case('LoRA(r=2)', 'linear', (5, 3), seed=1)
    """

    spec: Piece | str
    layer: str = "linear"
    shape: tuple[int, ...] = (6, 4)
    bias: bool = True
    stride: int = 1
    padding: int = 0
    groups: int = 1
    dtype: str = "float64"
    family: str = "plain"
    seed: int = 0

    @property
    def piece(self) -> Piece:
        """The composition."""
        if isinstance(self.spec, Piece):
            return self.spec
        return from_json(self.spec) if self.spec.startswith("{") else parse(self.spec)

    @property
    def place(self) -> Place:
        """Which layer."""
        return Place(self.shape, self.bias, self.stride, self.padding, self.groups)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The weight's dtype."""
        return cast(torch.dtype, getattr(torch, self.dtype))

    @property
    def layer_type(self) -> str:
        """What the layer is to a piece."""
        return LAYERS[self.layer].layer_type

    @property
    def weight_shape(self) -> WeightShape:
        """(out, in) of W, and the kernel."""
        out, *rest = self.shape
        return WeightShape(out, prod(rest), tuple(rest[1:]))

    def with_family(self, family: str) -> "Case":
        """The case on a weight of other values."""
        return replace(self, family=family)

    def base(self) -> nn.Module:
        """The plain layer, with values from the seed."""
        with torch.random.fork_rng(devices=[]):
            made = LAYERS[self.layer].build(self.place).to(torch.float64)
        draw = self.stream(1)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64).mul_(0.5))
            if self.family == "zero row":
                weight = cast(Tensor, made.weight)
                (weight.mT if LAYERS[self.layer].stores_transposed else weight)[0] = 0
        return LAYERS[self.layer].finish(made.to(self.torch_dtype))

    def site(self) -> Site:
        """What a generator may know of the layer, for calling `init` and `update` by hand."""
        base = self.base()
        kind = form_of(base)
        assert kind is not None
        form, weight = kind(base), cast(Tensor, base.weight)
        dtype = torch.promote_types(self.torch_dtype, torch.float32)
        return Site(form.base(weight, NormCache()), dtype, NAME, self.seed, one_hot=form.one_hot)

    def start(self, seed: int | None = None) -> AdaptedLinear:
        """The adapted layer as it starts.

        Args:
            seed: another one for the adapter; the base has the case's own.
        """
        return AdaptedLinear(self.base(), self.piece, seed=self.seed if seed is None else seed, name=NAME)

    def perturbed(self, seed: int | None = None) -> AdaptedLinear:
        """The adapted layer with every value away from its start."""
        layer = self.start(seed)
        perturb(layer, self.stream(2))
        return layer

    def inputs(self) -> Tensor:
        """A batch for the layer."""
        x = LAYERS[self.layer].inputs(self.place, self.stream(3))
        return x.to(self.torch_dtype) if x.is_floating_point() else x

    def functional(self, like: Tensor) -> Tensor:
        """A random functional of an output, so that every number in it counts with another weight."""
        return torch.randn(like.shape, generator=self.stream(4), dtype=torch.float64)

    def stream(self, what: int) -> torch.Generator:
        """A stream of random numbers for one use."""
        return torch.Generator().manual_seed(1000 * self.seed + what)

    def __repr__(self) -> str:
        rest = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)[3:] if getattr(self, f.name) != f.default]
        return f"Case({', '.join([self._text(), repr(self.layer), repr(self.shape), *rest])})"

    def _text(self) -> str:
        """The spec as it pastes: its text in quotes, or as JSON, where every piece is known by name."""
        if isinstance(self.spec, str):
            return repr(self.spec)
        known = pieces()
        if any(known.get(type(piece).__name__) is not type(piece) for piece in layers_of(self.spec)):
            return repr(self.spec)
        return repr(repr(self.spec) if parse(repr(self.spec)) == self.spec else to_json(self.spec))


def perturb(layer: AdaptedLinear, draw: torch.Generator) -> None:
    """Move every trained value: by a third of its own size, and not by less than a sixth of the base's.

    An update that is tiny beside W would lose its digits in W_inner − W, which slow truths may form.
    A mask of ranks (a buffer that runs along them) is drawn too, with at least one rank left; other buffers are state
    that the piece itself has made, and stay.
    """
    unit = _rms(layer.site().base.dense()) or 1.0
    for part in layer.adapter.parts():
        for name, value in part.values().items():
            noise = torch.randn(value.shape, generator=draw, dtype=torch.float64)
            size = _rms(value)
            with torch.no_grad():
                if part.roles[name] is not Role.BUFFER:
                    value.add_((0.3 * max(size, unit / 2) * noise).to(value))
                elif name in part.spec.rank_axes and value.dim() == 1 and bool((value == 1).all()):
                    value.copy_((noise < 0.7).to(value))
                    value[noise.argmin()] = 1
    layer.refresh()


def _rms(value: Tensor) -> float:
    """√mean(v²), 0 of nothing."""
    return float(value.detach().to(torch.float64).square().mean().sqrt()) if value.numel() else 0.0
