"""Ranks that are masked, counted and taken away."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adapterzoo.adapter import Adapter
from adapterzoo.errors import MergedError, TargetError, TrainingError, listing, where
from adapterzoo.layer import AdaptedLinear, adapted_layers
from adapterzoo.pieces import Parameters
from adapterzoo.sharded import is_sharded
from adapterzoo.training.attach import attachment_of
from adapterzoo.training.optimisers import plain_optimizer


def ranks(model: nn.Module) -> dict[str, int]:
    """How many ranks of each layer add to its update, for pieces whose ranks can be masked; by the layer's name.

    Example:
        >>> import torch
        >>> import adapterzoo as az
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
        >>> plan = az.adapt(model, az.MAP(az.AdaLoRA(r=4)))
        >>> az.ranks(model)
        {'0': 4, '1': 4}
    """
    return {name: int(_kept(part).sum()) for name, (_, part) in _maskable(model).items()}


@torch.no_grad()
def compact(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, int]:
    """Take masked ranks out of the parameters: the same outputs to round-off, for the time and memory of what is left.

    The layers get new, smaller parameters. The attached optimiser (or the one given) gets them in the place of the old
    ones, and what it remembers of them is cut alike, so training may go on; lists that you made of the old parameters,
    and a DistributedDataParallel around the model, have to be made anew. The scale stays alpha / r with the spec's r.
    A state_dict of a compacted model loads into one that is not, and the other way round: ranks follow the file.

    Args:
        model: a model with adapted layers; layers without masked ranks are left as they are.
        optimizer: the optimiser that trains it, where it is not attached.

    Returns:
        The ranks that are left, by layer: 0 where the whole update was masked.

    Raises:
        TargetError: no adapted layer.
        MergedError: a merged layer.
        TrainingError: a schedule that has not come to its end, parameters in shards, or an optimiser whose state of a
            parameter can't be cut. Nothing was changed.
    """
    layers = _maskable(model)
    if not adapted_layers(model):
        raise TargetError(f"this {type(model).__name__} has no adapted layer; adapt(model, spec) makes them")
    _check(layers)
    given = None if optimizer is None else plain_optimizer(optimizer)
    cuts = [
        _prepare(layer, part, key, axis, given)
        for layer, part in layers.values()
        if not bool(_kept(part).all())
        for key, axis in part.spec.rank_axes.items()
    ]
    for cut in cuts:
        _commit(cut)
    for layer, _ in layers.values():
        layer.refresh()
    return ranks(model)


class _Cut(NamedTuple):
    """One parameter or buffer with fewer ranks, and what an optimiser keeps of it."""

    part: Adapter
    name: str
    old: Tensor
    new: Tensor
    optimizer: Optimizer | None
    state: dict[str, Any]


def _prepare(layer: AdaptedLinear, part: Adapter, name: str, axis: int, given: Optimizer | None) -> _Cut:
    """Everything that can fail."""
    old, keep = part.values()[name], _kept(part)
    chosen = keep.nonzero()[:, 0].to(old.device)
    new = old.index_select(axis, chosen)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    attachment = attachment_of(layer)
    optimizer = given or (None if attachment is None else attachment.optimizer)
    known = {} if optimizer is None else optimizer.state.get(old, {})
    state = _cut_state(known, old, axis, chosen, f"{where(layer.name)}, {name}")
    return _Cut(part, name, old, new, optimizer, state)


# Note [New parameters, not other data]
# A parameter whose data gets another shape breaks in the next backward while any earlier loss is alive: autograd
# remembers the old shape. So parameters are replaced, in the layer and in the optimiser.
def _commit(cut: _Cut) -> None:
    """Assignments only."""
    setattr(cut.part, cut.name, cut.new)
    if cut.optimizer is None:
        return
    for group in cut.optimizer.param_groups:
        group["params"] = [cut.new if value is cut.old else value for value in group["params"]]
    if cut.old in cut.optimizer.state:
        del cut.optimizer.state[cut.old]
        cut.optimizer.state[cut.new] = cut.state


def _maskable(model: nn.Module) -> dict[str, tuple[AdaptedLinear, Adapter]]:
    """The layers whose generator has ranks that can be masked, with that generator's adapter."""
    layers = adapted_layers(model).items()
    return {name: (layer, layer.adapter.generator) for name, layer in layers if _has_ranks(layer.adapter.generator)}


def _has_ranks(part: Adapter) -> bool:
    return bool(part.spec.rank_axes)


def _kept(part: Adapter) -> Tensor:
    return part.spec.kept_ranks(Parameters(part.values()))


def _check(layers: Mapping[str, tuple[AdaptedLinear, Adapter]]) -> None:
    merged = [name for name, (layer, _) in layers.items() if layer.merged]
    if merged:
        raise MergedError(f"unmerge before compacting; these layers are merged:{listing(merged)}")
    for name, (layer, part) in layers.items():
        attachment = attachment_of(layer)
        if attachment is not None and not attachment.finished:
            raise TrainingError(
                f"{where(name)}: ranks may still come and go, at step {attachment.step} of {attachment.total_steps}; "
                "compact after the last allocation, or detach() first"
            )
        if any(is_sharded(value) for value in part.values().values()):
            raise TrainingError(
                f"{where(name)} is in shards over several processes, which can't be cut: gather its state_dict and "
                "load it into a model that is not sharded"
            )


def _cut_state(state: dict[str, Any], like: Tensor, axis: int, chosen: Tensor, what: str) -> dict[str, Any]:
    """An optimiser's state of a parameter; what is as large as the parameter is cut along the same axis."""
    cut = dict(state)
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.numel() <= 1:
            continue
        if value.shape != like.shape:
            raise TrainingError(
                f"{what}: the optimiser keeps {key!r} of shape {list(value.shape)} for a parameter {list(like.shape)}, "
                "and no one can tell how to cut it; compact after training, with the attachment detached"
            )
        cut[key] = value.index_select(axis, chosen)
    return cut
