"""Quantised linear layers: W is what codes and scales say, and inputs run through the library's own kernel."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterzoo.base import Base, WeightShape
from adapterzoo.factored import FactoredWeight
from adapterzoo.forms.form import Form
from adapterzoo.forms.linear import through_the_kernel
from adapterzoo.kept import NormCache
from adapterzoo.quantised import QuantisedBase, find, refusal


class Quantised(Form):
    """The quantised linear layers of bitsandbytes and torchao; those of other libraries are refused by name.

    Norms and factors are made of W as it is dequantised by blocks, exactly; what the kernel rounds on top of that is
    rounded in the output alone, as in the plain layer (docs/quantised.md).
    """

    kind: ClassVar[str] = "quantised"
    is_dense: ClassVar[bool] = False
    keeps_state: ClassVar[bool] = True

    def __init__(self, module: nn.Module) -> None:
        found = find(module)
        assert found is not None  # `problem` comes before
        super().__init__(module)
        self._class = found
        self.kind = found.kind  # type: ignore[misc]

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether it is a quantised linear layer of any library that is known here."""
        return find(module) is not None or refusal(module) is not None

    @classmethod
    def problem(cls, module: nn.Module) -> str | None:
        """What its library's file says."""
        kind = find(module)
        return refusal(module) if kind is None else kind.problem(module)

    def _shape(self) -> WeightShape:
        """(out_features, in_features): the weight itself may be packed."""
        module: Any = self.module
        return WeightShape(module.out_features, module.in_features)

    def matrix(self, weight: Tensor) -> Tensor:
        """A dequantised weight is W itself."""
        return weight

    def stored(self, matrix: Tensor) -> Tensor:
        """The matrix itself: what a merge puts in the place of the weight is an ordinary one."""
        return matrix

    def base(self, weight: Tensor, norms: NormCache) -> Base:
        """The calls, exact."""
        return self._base(weight, norms)

    def bad_input(self, x: Tensor, weight: Tensor) -> str | None:
        """Inputs are [..., in], of any floating dtype of at most 32 bits, as the libraries take them."""
        width = self.shape.in_features
        if x.dim() == 0 or x.shape[-1] != width:
            return f"takes inputs [..., {width}]; got {list(x.shape)}"
        if x.dtype in (torch.float32, torch.bfloat16, torch.float16):
            return None
        return f"has a quantised weight ({self.kind}) and takes float32, bfloat16 or float16; got {x.dtype}"

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """X Wᵀ + bias: as the layer itself computes it, or with the ordinary weight that a merge has put there."""
        if _is_ordinary(weight):
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return self._base(weight, NormCache()).by_kernel().apply(x, bias)

    def adapted(
        self, x: Tensor, stored: Tensor, weight: FactoredWeight, bias: Tensor | None, dropout: float, lean: bool
    ) -> Tensor:
        """X W'ᵀ + bias: [..., in] -> [..., out], by the one kernel, with the library's inside."""
        assert isinstance(weight.base, QuantisedBase)
        return through_the_kernel(x, weight.base.by_kernel(), weight, bias, dropout, lean)

    def released(self) -> nn.Module:
        """The quantised layer; an nn.Linear with its hooks where a merge has left an ordinary weight."""
        module: Any = self.module
        if not _is_ordinary(module.weight):
            return self.module
        if type(module) is nn.Linear:
            vars(module).pop("extra_repr", None)  # torchao's, which speaks of the quantised weight
            return self.module
        plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        plain._parameters = module._parameters
        for name, table in vars(module).items():
            if "hook" in name and not name.startswith("_load_state_dict"):  # those read its library's own files
                plain.__dict__[name] = table
        return plain

    def _base(self, weight: Tensor, norms: NormCache) -> QuantisedBase:
        return self._class(self.module, weight, norms)


def _is_ordinary(weight: Tensor) -> bool:
    return type(weight) in (nn.Parameter, Tensor)
