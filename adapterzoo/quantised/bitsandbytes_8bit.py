"""bitsandbytes' 8-bit layers (LLM.int8())."""

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adapterzoo.base import own_forward
from adapterzoo.kept import NormCache
from adapterzoo.quantised.base import QuantisedBase


class EightBit(QuantisedBase):
    """A bitsandbytes.nn.Linear8bitLt: w_ij = code_ij · scale_i / 127.

    Its kernel rounds inputs to 8 bits as well, row by row, but in training on a CPU. Norms need W Vᵀ to five digits and
    not to two, so thin factors are multiplied with blocks of codes instead.
    """

    kind: ClassVar[str] = "bitsandbytes 8-bit"

    def __init__(self, module: nn.Module, weight: Tensor, norms: NormCache) -> None:
        super().__init__(module, weight, norms)
        if self.weight.SCB is None:
            _return_scales(self.module, self.weight)

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether it is a Linear8bitLt."""
        kind = _linear()
        return kind is not None and isinstance(module, kind)

    @classmethod
    def problem(cls, module: nn.Module) -> str | None:
        """It has to be quantised, and not from 16-bit weights at every call."""
        if module.state.has_fp16_weights:  # type: ignore[union-attr]
            return (
                "has_fp16_weights=True keeps its weight in 16 bits and quantises it at every call; "
                "build it with has_fp16_weights=False, or adapt an nn.Linear"
            )
        if module.weight.SCB is None and module.state.SCB is None:  # type: ignore[union-attr]
            return "its weight is not quantised yet, which bitsandbytes does in model.to(device): call that first"
        return own_forward(module, _linear())

    @property
    def dtype(self) -> torch.dtype:
        """The bias's, else float32: bitsandbytes forgets what it quantised from."""
        bias: Tensor | None = self.module.bias
        return torch.float32 if bias is None else bias.dtype

    @property
    def _scales(self) -> Tensor:
        scales: Tensor = self.weight.SCB
        return scales.to(self.weight.device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The codes and their scales."""
        return (self.weight, self._scales)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows of W, as the library's backward has them."""
        scales = self._scales[start:stop, None].mul(1.0 / 127.0)
        codes: Tensor = self.weight.detach()[start:stop].to(dtype)
        return codes.mul_(scales)

    def kernel(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """On a CPU in training with W dequantised, else in 8 bits, as the layer itself."""
        library = sys.modules["bitsandbytes"]
        state = library.MatmulLtState()
        state.has_fp16_weights, state.threshold = False, self.module.state.threshold
        state.CB, state.SCB = self.weight.detach(), self._scales
        state.is_training = self.module.training
        flat = x.reshape(-1, x.shape[-1])
        if flat.dtype == torch.float16 and state.threshold > 0:
            flat = flat.clone()  # the kernel writes to it and puts it back, which autograd takes for a change
        bias = None if bias is None else bias.to(x.dtype)
        y: Tensor = library.matmul(flat, self.weight, bias=bias, state=state)
        return y.reshape(*x.shape[:-1], len(state.CB))


def _linear() -> Any:
    return getattr(sys.modules.get("bitsandbytes.nn.modules"), "Linear8bitLt", None)


def _return_scales(module: Any, weight: Any) -> None:
    """Undo what the layer's first forward does: a weight that holds its scales can be moved and loaded with them."""
    weight.CB, weight.SCB = weight.data, module.state.SCB
    module.state.CB = module.state.SCB = None
