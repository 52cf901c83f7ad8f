"""Batches on a device, and random numbers of one's own."""

from collections.abc import Mapping
from typing import Any

import torch


def moved(batch: Any, device: torch.device) -> Any:
    """A batch on a device: tensors in tuples, lists and mappings, and whatever else has a method `to`."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was told, so that the clock says what that took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Randomness:
    """A state of torch's global generators that belongs to one run: inside of `with`, dropout draws from it.

    Outside, the generators are as they were; runs that take turns in one process do not see each other.

    Args:
        seed: of the run.
        device: where the run trains; a GPU has a generator of its own.

    Example:
        >>> mine, before = Randomness(7, torch.device("cpu")), torch.get_rng_state()
        >>> with mine:
        ...     first = torch.rand(2)
        >>> torch.get_rng_state().equal(before)
        True
        >>> with mine:
        ...     second = torch.rand(2)
        >>> both = torch.rand(4, generator=torch.Generator().manual_seed(7))
        >>> torch.cat([first, second]).equal(both)
        True
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self._own = self._states(torch.Generator("cpu").manual_seed(seed).get_state(), seed)
        self._outside: list[torch.Tensor] = []

    def __enter__(self) -> None:
        self._outside = self._swap(self._own)

    def __exit__(self, *_: object) -> None:
        self._own = self._swap(self._outside)

    def _states(self, cpu: torch.Tensor, seed: int) -> list[torch.Tensor]:
        gpu = self._device.type == "cuda"
        return [cpu] + ([torch.Generator(self._device).manual_seed(seed).get_state()] if gpu else [])

    def _swap(self, states: list[torch.Tensor]) -> list[torch.Tensor]:
        """Set the generators; give back their states before."""
        before = [torch.get_rng_state()]
        torch.set_rng_state(states[0])
        for state in states[1:]:
            before.append(torch.cuda.get_rng_state(self._device))
            torch.cuda.set_rng_state(state, self._device)
        return before
