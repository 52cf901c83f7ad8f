"""torchao's weights: linear layers of torch whose weight is one of its tensors."""

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adapterzoo.base import own_forward
from adapterzoo.quantised.base import QuantisedBase

_SUPPORTED = ("Int8Tensor",)


class TorchAO(QuantisedBase):
    """An nn.Linear whose weight is torchao's Int8Tensor, with scales by row, by group or for all of it."""

    kind: ClassVar[str] = "torchao int8"

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether it is an nn.Linear with a weight of torchao's."""
        kind = getattr(sys.modules.get("torchao.utils"), "TorchAOBaseTensor", None)
        return kind is not None and isinstance(module, nn.Linear) and isinstance(module.weight, kind)

    @classmethod
    def problem(cls, module: nn.Module) -> str | None:
        """Its weight has to be 8-bit, and nothing else may be quantised or scaled on the way."""
        weight: Any = module.weight
        kind = type(weight).__name__
        if kind not in _SUPPORTED:
            return (
                f"its weight is torchao's {kind}, whose products adapterzoo has not been checked with; "
                "quantise with Int8WeightOnlyConfig, or with bitsandbytes for 4 bits"
            )
        if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:
            return "it quantises or scales its inputs too; quantise weights alone, with Int8WeightOnlyConfig"
        if weight.zero_point is not None and bool(weight.zero_point.any()):
            return "its codes have zero points; quantise symmetrically, as Int8WeightOnlyConfig does"
        return own_forward(module, nn.Linear)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it was quantised from."""
        dtype: torch.dtype = self.weight.dtype
        return dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The codes and their scales."""
        weight = self.weight
        return (weight.qdata, weight.scale)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows of W, scaled in float32."""
        weight, width = self.weight, self.shape.in_features
        scales = weight.scale.expand(self.shape.out_features, -1)[start:stop, :, None]
        codes = weight.qdata[start:stop].to(torch.float32).reshape(stop - start, scales.shape[1], -1)
        rows: Tensor = codes.mul_(scales).reshape(stop - start, width).to(dtype)
        return rows

    def kernel(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """By torchao's own linear, in the dtype of x."""
        return nn.functional.linear(x, self.weight, bias)
