"""What a model takes and gives: trees of tensors whose first axis is the batch, joined and parted along it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


class UnpackableError(Exception):
    """Runs that can't share a forward: a sentence why. It never reaches a user; the runs are done one by one."""


def joined(trees: Sequence[Any], fill: bool = False) -> Any:
    """One tree for several of the same build, their tensors laid end to end along the first axis.

    Args:
        trees: what to join.
        fill: where other axes differ in length, as those of tokens do, fill shorter ones up with zeros; then the first
            axes have to be equally long.

    Raises:
        UnpackableError: they differ in build, in what is no tensor, or in the length of an axis.

    Example:
        >>> import torch
        >>> joined([{"x": torch.zeros(2, 3)}, {"x": torch.ones(2, 3)}])["x"].shape
        torch.Size([4, 3])
    """
    flat = [tree_flatten(tree) for tree in trees]
    if any(build != flat[0][1] for _, build in flat):
        raise UnpackableError("the model is called in different ways by different runs")
    return tree_unflatten(
        [_join(leaves, fill) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)], flat[0][1]
    )


def parted(tree: Any, shares: Sequence[int]) -> list[Any]:
    """The tree cut along the first axis of its tensors.

    Args:
        tree: what to cut.
        shares: of every part, such as [2, 1]: the first part is twice as long as the second.

    Raises:
        UnpackableError: a tensor has no such axis.
    """
    leaves, build = tree_flatten(tree)
    cut = [_cut(leaf, shares) for leaf in leaves]
    return [tree_unflatten([pieces[part] for pieces in cut], build) for part in range(len(shares))]


def shapes(tree: Any) -> tuple[tuple[int, ...], ...]:
    """The shape of every tensor of a tree."""
    return tuple(tuple(leaf.shape) for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))


def cropped(output: Any, call: Any, joint: Any) -> Any:
    """A run's output without what came of filling its call up: axes as long as a filled one become as long as its own.

    Args:
        output: the run's part of the output.
        call: its own call.
        joint: the call of all runs.
    """
    lengths = {
        (axis, whole): own
        for mine, all_of_them in zip(shapes(call), shapes(joint), strict=True)
        for axis, (own, whole) in enumerate(zip(mine, all_of_them, strict=True))
        if axis > 0 and own != whole
    }
    return tree_map(lambda leaf: _crop(leaf, lengths) if lengths and isinstance(leaf, Tensor) else leaf, output)


def _join(leaves: Sequence[Any], fill: bool) -> Any:
    first = leaves[0]
    if all(isinstance(leaf, Tensor) for leaf in leaves):
        if not _fit(leaves, fill):
            found = ", ".join(str(list(leaf.shape)) for leaf in leaves[:4])
            raise UnpackableError(f"the batches of different runs don't fit together: {found}")
        return torch.cat([_filled(leaf, leaves) for leaf in leaves] if fill else list(leaves))
    if all(not isinstance(leaf, Tensor) and leaf == first for leaf in leaves):
        return first
    raise UnpackableError("the model is called with different settings by different runs")


def _fit(leaves: Sequence[Tensor], fill: bool) -> bool:
    kinds = {(leaf.dim(), leaf.shape[0] if fill else leaf.shape[1:]) for leaf in leaves if leaf.dim()}
    return len(kinds) == 1 and all(leaf.dim() for leaf in leaves)


def _crop(leaf: Tensor, lengths: Mapping[tuple[int, int], int]) -> Tensor:
    for axis, length in enumerate(leaf.shape):
        leaf = leaf.narrow(axis, 0, lengths.get((axis, length), length))
    return leaf


def _filled(leaf: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    missing = [max(sizes) - own for own, *sizes in zip(leaf.shape, *(each.shape for each in leaves), strict=True)]
    return F.pad(leaf, [n for length in reversed(missing) for n in (0, length)]) if any(missing) else leaf


def _cut(leaf: Any, shares: Sequence[int]) -> Sequence[Any]:
    if not isinstance(leaf, Tensor):
        return [leaf] * len(shares)
    length, runs = leaf.shape[0] if leaf.dim() else 0, sum(shares)
    if length == 0 or length % runs:
        raise UnpackableError(f"the first axis of a tensor {list(leaf.shape)} can't be the batch of {runs} runs")
    parts: Sequence[Tensor] = leaf.split([share * (length // runs) for share in shares])  # type: ignore[no-untyped-call]
    return parts
