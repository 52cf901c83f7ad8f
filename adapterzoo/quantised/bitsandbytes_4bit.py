"""bitsandbytes' 4-bit layers: NF4 and FP4, with plain or doubly quantised scales."""

import sys
from math import gcd
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adapterzoo.base import own_forward
from adapterzoo.kept import NormCache
from adapterzoo.quantised.base import QuantisedBase


class FourBit(QuantisedBase):
    """A bitsandbytes.nn.Linear4bit: w = code · scale, one scale for every `blocksize` elements of W by rows.

    Its forward in evaluation, on processors with AVX512-BF16, first stores the weight in another layout and rounds its
    scales to bfloat16, for a kernel in bfloat16. An adapted layer never does that, and undoes it where it has happened:
    the weight keeps its values.
    """

    kind: ClassVar[str] = "bitsandbytes 4-bit"

    def __init__(self, module: nn.Module, weight: Tensor, norms: NormCache) -> None:
        super().__init__(module, weight, norms)
        if getattr(_state(module, weight), "packing_format_for_cpu", False):
            _unpack(module, weight)
        self._state: Any = _state(module, weight)

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether it is a Linear4bit."""
        kind = _linear()
        return kind is not None and isinstance(module, kind)

    @classmethod
    def problem(cls, module: nn.Module) -> str | None:
        """It has to be quantised, by scales in the order in which bitsandbytes reads them."""
        other = own_forward(module, _linear())
        if other is not None:
            return other
        state = _state(module, module.weight)
        if state is None:
            return "its weight is not quantised yet, which bitsandbytes does in model.to(device): call that first"
        if state.nested and state.state2.blocksize != 256:
            return (
                f"its scales are quantised by blocks of {state.state2.blocksize}; bitsandbytes computes with 256 only"
            )
        if state.absmax.dim() != 1 and not getattr(state, "packing_format_for_cpu", False):
            return (
                "its scales are in an order that its own forward misreads, as bitsandbytes leaves them when "
                "state_dict() is called after an evaluation on this processor; quantise or load the layer again"
            )
        return _misreading(module, state)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it was quantised from."""
        dtype: torch.dtype = self._state.dtype
        return dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The codes and their scales."""
        return (self.weight, self._state.absmax)

    @property
    def step(self) -> int:
        """Rows that end where a block of scales ends."""
        size: int = self._state.blocksize
        return size // gcd(size, self.shape.in_features)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows of W, by the library's own dequantisation."""
        width, size = self.shape.in_features, self._state.blocksize
        wide = torch.float32 if dtype == torch.float64 else dtype
        codes = self.weight.detach().view(torch.uint8).reshape(-1)[start * width // 2 : -(-stop * width // 2)]
        block: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            codes.reshape(-1, 1),
            self._scales()[start * width // size : -(-stop * width // size)],
            size,
            self._state.quant_type,
            [stop - start, width],
            wide,
        )
        return block.to(dtype)

    def kernel(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """In the layer's compute dtype, or in that of x where none is set."""
        set_before = self.module.compute_dtype if self.module.compute_type_is_set else None
        compute = set_before or x.dtype
        bias = None if bias is None else bias.to(compute)
        matmul = sys.modules["bitsandbytes"].matmul_4bit
        y: Tensor = matmul(x.to(compute), self.weight, bias=bias, quant_state=self._state).to(x.dtype)
        return y

    def _scales(self) -> Tensor:
        """One scale for every block: [out · in / blocksize], in float32."""
        state = self._state
        if not state.nested:
            return state.absmax.float()  # type: ignore[no-any-return]
        scales = sys.modules["bitsandbytes"].functional.dequantize_blockwise(state.absmax, state.state2)
        return (scales + state.offset).float()  # type: ignore[no-any-return]


def _linear() -> Any:
    return getattr(sys.modules.get("bitsandbytes.nn.modules"), "Linear4bit", None)


def _state(module: nn.Module, weight: Any) -> Any:
    """The scales: with the weight, or with the layer where a conversion of the weight has lost them."""
    return getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)


# Note [Rows that end inside a block of scales]
# For these the processor kernel of bitsandbytes 0.50 with AVX-512 takes the scales of other blocks, so a plain
# layer itself is wrong. Asked for the same codes as one long row, it reads them right.
def _misreading(module: Any, state: Any) -> str | None:
    width, size = module.in_features, state.blocksize
    if width % size == 0 or module.weight.is_meta:
        return None
    rows = min(module.out_features, 2 * size // gcd(size, width))
    codes = module.weight.detach().view(torch.uint8).reshape(-1, 1)[: -(-rows * width // 2)]
    scales = torch.ones(len(state.absmax), device=codes.device).cumsum(0)[: -(-rows * width // size)]
    reads = [
        torch.ops.bitsandbytes.dequantize_4bit.default(codes, scales, size, state.quant_type, shape, torch.float32)
        for shape in ([rows, width], [1, rows * width])
    ]
    if reads[0].flatten().equal(reads[1].flatten()):
        return None
    return (
        f"in_features={width} is no multiple of its blocksize {size}, for which bitsandbytes reads wrong scales on "
        "this processor, so that the plain layer itself is wrong; leave it unquantised, or quantise it in 8 bits"
    )


def _unpack(module: Any, weight: Any) -> None:
    """Undo the layout for evaluation, in place.

    bitsandbytes' own inverse leaves plain scales transposed, and quantises double ones anew. Here the scales are those
    of the weight as it stands, in float32, so no value of W changes.
    """
    state = _state(module, weight)
    scales, state.original_nested = state.absmax.mT.reshape(-1).float(), False
    inverse = sys.modules["bitsandbytes"].functional._convert_weight_packed_for_cpu_inverse
    weight.data, state = inverse(weight.data, state)
    state.absmax = scales
    weight.quant_state = module.quant_state = state
