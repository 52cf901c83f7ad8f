"""Quantised weights under adapters: one file for each library, none of which is ever imported from here.

A module of theirs exists only where its library is imported already, so that is where it is looked for.
"""

from math import prod

from torch import Tensor, nn

from adapterzoo.quantised.base import QuantisedBase as QuantisedBase
from adapterzoo.quantised.bitsandbytes_4bit import FourBit
from adapterzoo.quantised.bitsandbytes_8bit import EightBit
from adapterzoo.quantised.others import refusal as refusal
from adapterzoo.quantised.torchao import TorchAO

KINDS: tuple[type[QuantisedBase], ...] = (FourBit, EightBit, TorchAO)
"""Every kind, in the order in which a module is offered to them."""


def find(module: nn.Module) -> type[QuantisedBase] | None:
    """The kind of quantised layer that a module is; None if it is none.

    Args:
        module: any module of a model.

    Returns:
        A class whose `problem(module)` says whether this one can be adapted, and which makes its calls.

    Example:
        >>> import torch
        >>> from adapterzoo.quantised import find
        >>> find(torch.nn.Linear(4, 3)) is None
        True
    """
    return next((kind for kind in KINDS if kind.claims(module)), None)


def numbers(value: Tensor) -> int:
    """How many numbers a tensor stands for: bitsandbytes packs two into a byte, and keeps the shape beside it."""
    return prod(getattr(getattr(value, "quant_state", None), "shape", value.shape))
