"""The adapters of one composition in several runs, computed as one: factors stacked, products batched."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from adapterzoo.ablation.packing.trees import UnpackableError
from adapterzoo.adapter import Adapter
from adapterzoo.base import Base, WeightShape
from adapterzoo.factored import FactoredWeight, RightFactor
from adapterzoo.layer import AdaptedLinear
from adapterzoo.pieces import Site


def can_stack(layer: AdaptedLinear) -> bool:
    """Whether a layer's update is thin or dense, and has values of its own: those of several runs can be stacked."""
    with torch.no_grad():
        weight = layer.factored_weight()
    return not (weight.turns or weight.structured) and bool(layer.adapter.state_dict())


class Stack:
    """Like tensors of several modules in one tensor each: [runs, ...]; every module's own tensors become views of it.

    An optimiser writes to the views, so nothing is copied from step to step.

    Args:
        modules: their parameters and buffers have the same names and shapes.

    Raises:
        UnpackableError: they have not.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._own = _tables(modules)
        self.tensors: dict[str, Tensor] = {}
        for name, values in self._own.items():
            whole = torch.stack([value.detach() for value in values])
            self.tensors[name] = whole.requires_grad_(values[0].requires_grad)
            for value, view in zip(values, whole.detach().unbind(0), strict=True):
                value.data = view

    def hand_out(self) -> None:
        """Give every parameter its part of the gradient, in the place of any that it had."""
        for name, whole in self.tensors.items():
            if whole.requires_grad:
                own = self._own[name]
                parts = [None] * len(own) if whole.grad is None else whole.grad.unbind(0)
                for value, part in zip(own, parts, strict=True):
                    value.grad = part
                whole.grad = None

    def release(self) -> None:
        """Give every tensor memory of its own again."""
        for values in self._own.values():
            for value in values:
                value.data = value.data.clone()


def _tables(modules: Sequence[nn.Module]) -> dict[str, list[Tensor]]:
    tables = [{**dict(module.named_parameters()), **dict(module.named_buffers())} for module in modules]
    kinds = [{name: (v.shape, v.dtype, v.requires_grad) for name, v in table.items()} for table in tables]
    if any(kind != kinds[0] for kind in kinds):
        raise UnpackableError("adapters of one composition have tensors of different shapes")
    return {name: [table[name] for table in tables] for name in tables[0]}


@dataclass(frozen=True, eq=False)
class KnownNorms:
    """A frozen weight with its norms at hand: under vmap a layer would compute them anew."""

    base: Base
    squares: Tensor
    columns: Tensor

    @property
    def shape(self) -> WeightShape:
        """As the weight's."""
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        """As the weight's."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        """As the weight's."""
        return self.base.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """As the weight's."""
        return self.base.tensors

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X Wᵀ + bias."""
        return self.base.apply(x, bias)

    def apply_t(self, y: Tensor) -> Tensor:
        """Y W."""
        return self.base.apply_t(y)

    def row_norms_sq(self) -> Tensor:
        """‖w_i‖²: [out], as they were when the runs were packed."""
        return self.squares

    def column_norms_sq(self) -> Tensor:
        """Those of the columns: [in], as they were when the runs were packed."""
        return self.columns

    def dense(self) -> Tensor:
        """W."""
        return self.base.dense()


class _Factors(nn.Module):
    """The tensors of a composition's normal form, as a function of its parameters; what is no tensor goes to `rest`."""

    def __init__(self, adapter: Adapter, site: Site) -> None:
        super().__init__()
        self.adapter, self.site = adapter, site
        self.rest = (0, 0.0)

    def forward(self) -> dict[str, Tensor]:
        """W' without W: the tensors that are there."""
        weight = self.adapter.weight(self.site)
        self.rest = weight.drop_rows, weight.dropout
        found = {"delta": weight.delta, "U": weight.U, "remainder": weight.remainder}
        if weight.V is not None:
            found["V"] = weight.V.value
            if weight.V.steps is not None:
                found["core"], found["channels"] = weight.V.steps
        return {name: value for name, value in found.items() if value is not None}


class StackedLayer(nn.Module):
    """Adapted layers of one composition over one frozen weight, each on its own part of the batch.

        y_k = x_k Wᵀ + δ_k∘(x_k Wᵀ) + (x_k V_kᵀ) U_kᵀ + x_k D_kᵀ + bias

    x Wᵀ is one product for all; U_k, V_k, δ_k and D_k are made for all runs by one call (vmap) and applied by batched
    products. In layers that are no ordinary linear ones, each part runs through the layer's own kernel.

    Args:
        layers: one a run.
    """

    layers: list[AdaptedLinear]
    _factors: _Factors

    def __init__(self, layers: Sequence[AdaptedLinear]) -> None:
        super().__init__()
        first = layers[0]
        self.__dict__["layers"] = list(layers)  # no submodules: their parameters stay their runs' own
        self.stack = Stack([layer.adapter for layer in layers])
        site = first.site()
        self._site = replace(site, base=KnownNorms(site.base, site.base.row_norms_sq(), site.base.column_norms_sq()))
        self.__dict__["_factors"] = _Factors(first.adapter, self._site)
        self._build = vmap(self._of_one)

    def forward(self, x: Tensor) -> Tensor:
        """The parts of the batch end to end: [runs · n, ...] -> [runs · n, ...]."""
        found = self._build({f"adapter.{name}": value for name, value in self.stack.tensors.items()})
        if self.training and self._factors.rest[1]:
            raise UnpackableError("its adapters drop inputs at random")
        if self._takes_products(x):
            return self._by_products(x, found)
        parts = x.chunk(len(self.layers))
        return torch.cat([self._part(k, part, found) for k, part in enumerate(parts)])

    def _of_one(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = functional_call(self._factors, dict(values), ())
        return made

    def _takes_products(self, x: Tensor) -> bool:
        """Whether plain batched products round as the layer does."""
        form, dtype = self.layers[0].form, self._site.dtype
        plain = form.is_linear and form.is_dense and not torch.is_autocast_enabled(x.device.type)
        return plain and x.dtype == self._site.base.dtype == dtype

    def _by_products(self, x: Tensor, found: Mapping[str, Tensor]) -> Tensor:
        delta, bias = found.get("delta"), self.layers[0]._bias
        z = self._site.base.apply(x, bias if delta is None else None)
        rows, y = (t.reshape(len(self.layers), -1, t.shape[-1]) for t in (x, z))  # [runs, tokens, in or out]
        if delta is not None:
            gain = (1 + delta)[:, None]
            y = y * gain if bias is None else torch.addcmul(bias, y, gain)
        if "U" in found:
            y = torch.baddbmm(y, rows @ found["V"].mT, found["U"].mT)
        if "remainder" in found:
            y = torch.baddbmm(y, rows, found["remainder"].mT)
        return y.reshape(z.shape)

    def _part(self, k: int, x: Tensor, found: Mapping[str, Tensor]) -> Tensor:
        """One run's part by the layer's own kernel."""
        layer = self.layers[k]
        own: dict[str, Any] = {name: value[k] for name, value in found.items()}
        base = layer.site().base
        steps = (own["core"], own["channels"]) if "core" in own else None
        right = RightFactor(base, own["V"], steps) if "V" in own else None
        weight = FactoredWeight(
            base, own.get("delta"), own.get("U"), right, own.get("remainder"), self._factors.rest[0]
        )
        return layer.form.adapted(x, layer.weight, weight, layer._bias, 0.0, layer.lean)
