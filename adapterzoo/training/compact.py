"""Ranks that are masked, counted and taken away."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from adapterzoo.adapter import Adapter, reshape
from adapterzoo.errors import MergedError, TargetError, TrainingError, listing, where
from adapterzoo.layer import AdaptedLinear, adapted_layers
from adapterzoo.pieces import Parameters
from adapterzoo.sharded import is_sharded
from adapterzoo.training.optimisers import plain_optimizer
from adapterzoo.watch import WATCH


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


@torch.inference_mode(False)
@torch.no_grad()
def compact(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, int]:
    """Take masked ranks out of the parameters: the same outputs to round-off, for the time and memory of what is left.

    The parameters stay the same objects, with fewer numbers; what the attached optimiser (or the one given) remembers
    of them is cut alike, so training may go on. A DistributedDataParallel around the model has to be made anew. The
    scale stays alpha / r with the spec's r. A state_dict of a compacted model loads into one that is not, and the other
    way round: ranks follow the file.

    Args:
        model: a model with adapted layers; layers without masked ranks are left as they are.
        optimizer: the optimiser that trains it, where it is not attached.

    Returns:
        The ranks that are left, by layer: 0 where the whole update was masked.

    Raises:
        TargetError: no adapted layer.
        MergedError: a merged layer.
        TrainingError: a schedule that has not come to its end, parameters in shards, an optimiser whose state of a
            parameter can't be cut, or that does not hold it. Nothing was changed.
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
    """A parameter or buffer, what is left of it, and what is left of the optimiser's state of it."""

    old: Tensor
    data: Tensor
    grad: Tensor | None
    state: dict[str, Any]
    new_state: dict[str, Any]


def _prepare(layer: AdaptedLinear, part: Adapter, name: str, axis: int, given: Optimizer | None) -> _Cut:
    """Everything that can fail."""
    old, keep = part.values()[name], _kept(part)
    chosen, what = keep.nonzero()[:, 0].to(old.device), f"{where(layer.name)}, {name}"
    attendant = WATCH.attendant_of(layer)
    optimizer = given if attendant is None or given is not None else attendant.optimizer
    if isinstance(optimizer, LBFGS) and optimizer.state:
        raise TrainingError(f"{what}: L-BFGS has one memory for all parameters, which can't be cut; begin a new one")
    if given is not None and attendant is not None and attendant.optimizer is not given:
        raise TrainingError(f"{what} is attached to another optimiser than the given one; give that one, or none")
    held = [] if given is None else [p for group in given.param_groups for p in group["params"]]
    if given is not None and isinstance(old, nn.Parameter) and not any(p is old for p in held):
        raise TrainingError(f"{what} is not held by the optimiser that was given; give the one that trains it, or none")
    state = {} if optimizer is None else optimizer.state.get(old, {})
    new_state = {key: _cut(value, old, axis, chosen, f"{what}: {key!r}") for key, value in state.items()}
    grad = None if old.grad is None else old.grad.index_select(axis, chosen)
    return _Cut(old, old.detach().index_select(axis, chosen), grad, state, new_state)


def _commit(cut: _Cut) -> None:
    """Assignments only."""
    reshape(cut.old, cut.data, cut.grad)
    cut.state.update(cut.new_state)


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
        attendant = WATCH.attendant_of(layer)
        if attendant is not None and not attendant.finished:
            raise TrainingError(
                f"{where(name)}: ranks may still come and go, at step {attendant.step} of {attendant.total_steps}; "
                "compact after the last allocation, or detach() first"
            )
        if any(is_sharded(value) for value in part.values().values()):
            raise TrainingError(
                f"{where(name)} is in shards over several processes, which can't be cut: gather its state_dict and "
                "load it into a model that is not sharded"
            )


def _cut(value: Any, like: Tensor, axis: int, chosen: Tensor, what: str) -> Any:
    """An entry of an optimiser's state: cut along the same axis if it is as large as the parameter."""
    if not isinstance(value, Tensor):
        return value
    if value.shape == like.shape:
        return value.index_select(axis, chosen)
    if value.numel() <= 1:
        return value
    raise TrainingError(
        f"{what} in the optimiser's state has shape {list(value.shape)} for a parameter {list(like.shape)}, and no one "
        "can tell how to cut it; compact after training, with the attachment detached"
    )
