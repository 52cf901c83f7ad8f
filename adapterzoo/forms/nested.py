"""Nested batches, taken apart for layers that map every token by itself."""

from collections.abc import Callable

import torch
from torch import Tensor

from adapterzoo.errors import InputError


def by_token(forward: Callable[[Tensor], Tensor], x: Tensor, name: str) -> Tensor:
    """Apply a layer to every token of a nested batch; nn.TransformerEncoder nests padded ones in evaluation.

    Args:
        forward: the layer, for ordinary tensors.
        x: a nested tensor, strided or jagged.
        name: the layer's, for messages.

    Raises:
        InputError: a jagged tensor with holes, or whose ragged dimension is not the second.
    """
    if x.layout != torch.jagged:
        return torch.nested.as_nested_tensor([forward(part) for part in x.unbind()])
    if x.lengths() is not None or x._ragged_idx != 1:  # type: ignore[attr-defined]
        raise InputError(name, "takes contiguous jagged inputs [batch, ragged, in]; call .contiguous() first")
    offsets = x.offsets()  # type: ignore[attr-defined]
    return torch.nested.nested_tensor_from_jagged(forward(x.values()), offsets)
