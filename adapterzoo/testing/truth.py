"""What the slow truths of a composition say of a layer, in float64, and how far round-off may move it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from adapterzoo.adapter import Adapter
from adapterzoo.base import DenseBase
from adapterzoo.kept import NormCache
from adapterzoo.layer import AdaptedLinear
from adapterzoo.pieces import Generator, Parameters, Piece, Wrapper
from adapterzoo.site import Site
from adapterzoo.testing.comparing import TOLERANCES, size


class Truth:
    """The composition of every piece's `dense`, and the layer's own forward on the weight that it gives.

    Args:
        layer: an adapted layer.
        x: a batch.
        functional: of the output: what gradients are taken of.
    """

    def __init__(self, layer: AdaptedLinear, x: Tensor, functional: Tensor) -> None:
        self._layer, self._x, self._functional = layer, x, functional
        self.tolerance = TOLERANCES[layer.weight.dtype if layer.form.is_dense else x.dtype]
        base = layer.site().base.dense().detach()
        self.base = base.to(torch.float64)

    @cached_property
    def found(self) -> Mapping[str, Tensor]:
        """ "weight", "update", "forward", "gradient of x" and "gradient of NAME" for every parameter."""
        return self._measured(0.0, torch.float64)

    @cached_property
    def _moved(self) -> Mapping[str, Tensor]:
        return self._measured(self.tolerance.jitter, self.tolerance.arithmetic)

    def limit(self, name: str, scale: float, gradient: bool = False) -> float:
        """How far a result may be off: the tolerance of its scale, and what round-off moves.

        That is what comes of some jitter of all numbers, in the arithmetic that the layer uses.

        Args:
            name: of the result, as in `found`.
            scale: its natural size.
            gradient: whether it is one.
        """
        relative = self.tolerance.gradient if gradient else self.tolerance.value
        return relative * scale + 4 * size(self._moved[name] - self.found[name])

    def output_scale(self) -> float:
        """The size of the output, and of the base's."""
        plain = self._layer.form.plain(self._x_wide(), self._layer.form.stored(self.base), None)
        return size(self.found["forward"]) + size(plain)

    def weight_scale(self) -> float:
        """The size of W' and of W."""
        return size(self.found["weight"]) + size(self.base)

    def x_scale(self) -> float:
        """The size of the input's gradient, and of the functional through the base."""
        return size(self.found["gradient of x"]) + self.tolerance.idle * size(self._functional) * self.weight_scale()

    def gradient_scale(self, name: str) -> float:
        """The size of a parameter's gradient; and of its share of the work, since it may be zero by itself."""
        parameter = dict(self._layer.adapter.named_parameters())[name]
        work = size(self.found["gradient of the weight"]) * self.weight_scale()
        return size(self.found[f"gradient of {name}"]) + self.tolerance.idle * work / max(size(parameter), 1e-30)

    def _x_wide(self) -> Tensor:
        return self._x.to(torch.float64) if self._x.is_floating_point() else self._x

    def _measured(self, jitter: float, dtype: torch.dtype) -> Mapping[str, Tensor]:
        draw = torch.Generator().manual_seed(0)

        def moved(value: Tensor) -> Tensor:
            value = value.detach().to("cpu", torch.float64)
            noise = torch.randn(value.shape, generator=draw, dtype=torch.float64)
            return (value * (1 + jitter * noise)).to(dtype)

        trained = {name for name, _ in self._layer.adapter.named_parameters()}
        leaves = {
            name: moved(value).requires_grad_() if name in trained else value.detach().to("cpu", dtype)
            for name, value in self._layer.adapter.state_dict().items()
        }
        weight = dense_weight(self._layer, leaves, moved(self.base))
        x = self._x_wide().detach().clone()
        x = x.to(dtype) if x.is_floating_point() else x
        leaves = {name: leaf for name, leaf in leaves.items() if name in trained}
        if x.is_floating_point():
            leaves["x"] = x.requires_grad_()
        bias = None if self._layer._bias is None else self._layer._bias.detach().to(dtype)
        y = self._layer.form.plain(x, self._layer.form.stored(weight), bias)
        leaves["the weight"] = weight
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        total = (y * self._functional.to(dtype)).sum()
        gradients = iter(torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else ())
        update = weight.detach() - self.base
        results = {"weight": weight.detach(), "update": update, "forward": y.detach()}
        for name, leaf in leaves.items():
            gradient = next(gradients, None) if leaf.requires_grad else None
            results[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
        return results


def dense_weight(layer: AdaptedLinear, values: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """W': [out, in] by the slow truths alone.

    Args:
        layer: an adapted layer.
        values: of every parameter and buffer, by its full name.
        base: W: [out, in].
    """
    site = replace(layer.site(), base=DenseBase(base, NormCache(), shape=layer.shape), dtype=base.dtype)
    return _dense(layer.adapter, values, "", site)


def _dense(adapter: Adapter, values: Mapping[str, Tensor], prefix: str, site: Site) -> Tensor:
    params, spec = Parameters({name: values[prefix + name] for name in adapter.roles}), adapter.spec
    own = replace(site, depth=spec.depth)
    if isinstance(spec, Wrapper) and adapter.inner is not None:
        return spec.dense(_dense(adapter.inner, values, f"{prefix}inner.", site), params, own)
    assert isinstance(spec, Generator)
    return site.base.dense() + spec.dense(params, own)


def has_own_truth(kind: type[Piece]) -> bool:
    """Whether a class has a slow truth, or its own closed form stands in for it."""
    default = Wrapper if issubclass(kind, Wrapper) else Generator
    return vars(default)["dense"] is not next(vars(each)["dense"] for each in kind.__mro__ if "dense" in vars(each))
