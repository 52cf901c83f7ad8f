"""Parameter groups by role, for any torch optimiser: what trains, sorted by what it does, never by its name."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapterzoo.adapter import Adapter
from adapterzoo.contract import initial_values
from adapterzoo.errors import MergedError, TrainingError, UninitialisedError, listing
from adapterzoo.layer import AdaptedLinear, adapted_layers
from adapterzoo.pieces import Role
from adapterzoo.watch import trains

_OTHER, _OTHER_NO_DECAY = "other", "other, no decay"


class Trained(NamedTuple):
    """A parameter that trains: its name in the model, itself, and its role; None outside adapters."""

    name: str
    parameter: nn.Parameter
    role: Role | None


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    core_lr: float | None = None,
    magnitude_lr: float | None = None,
    rotation_lr: float | None = None,
    b_lr_ratio: float = 1.0,
    other_lr: float | None = None,
    magnitude_weight_decay: float = 0.0,
    rotation_weight_decay: float = 0.0,
    scale_aware: bool = False,
) -> list[dict[str, Any]]:
    """Every parameter that trains, in one group each by its role; for any torch optimiser.

    The groups are, in this order and without those that would be empty: `direction.input`, `direction.output`,
    `direction.dense`, `core`, `magnitude`, `rotation`; then what trains outside adapters (heads, unfrozen layers):
    `other`, and for biases, norms and all else with fewer than two axes `other, no decay`. Parameters stand in the
    model's order. The same model gives the same groups at any time, so an optimiser's state loads into them.

    A weight decay is passed on as it is. What it does is the optimiser's: AdamW and SGD shrink a parameter by
    lr · weight_decay of itself at each step, so a larger rate of a group (`b_lr_ratio`, `scale_aware`) is a larger
    decay.

    Args:
        model: a model with adapted layers, also inside DDP, FSDP2 or torch.compile.
        lr: the rate of directions, and of all that has none of its own.
        weight_decay: of directions, cores and `other`.
        core_lr: of cores; lr if not given.
        magnitude_lr: of magnitudes; lr if not given.
        rotation_lr: of rotations; lr if not given.
        b_lr_ratio: LoRA+: output factors (LoRA's B, FLoRA's A) have this times lr.
        other_lr: of what trains outside adapters; lr if not given.
        magnitude_weight_decay: of magnitudes. Decay pulls the base weight to zero with them.
        rotation_weight_decay: of rotations.
        scale_aware: for optimisers of Adam's kind, whose step is as large as the rate, whatever the gradient: multiply
            the rate of each magnitude by the root mean square of its start (six digits of it; 1 for a start of 0), so
            that a step is as large a part of MAP's alpha, which starts at ‖W‖_F, as of its beta, which starts at 1.
            There is a group for each such factor, `magnitude x 5.74`. The start is computed from the base weight, not
            read off the parameter.

    Returns:
        Dicts with params, name, lr and weight_decay.

    Raises:
        TrainingError: a number out of its range; nothing trains; a parameter inside an adapter without a role, with
            two, or shared with something else; a start that is not finite.
        MergedError: an adapter that trains in a layer that is merged.
        UninitialisedError: scale_aware, and the base weight has no values yet.

    Example:
        >>> import torch
        >>> from adapterzoo import MAP, LoRA, adapt, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
        >>> plan = adapt(model, MAP(LoRA(r=2)), ["0"], train=["1"])
        >>> groups = param_groups(model, 1e-3, weight_decay=0.01, b_lr_ratio=16)
        >>> for group in groups:
        ...     print(group["name"], group["lr"], group["weight_decay"], len(group["params"]))
        direction.input 0.001 0.01 1
        direction.output 0.016 0.01 1
        magnitude 0.001 0.0 2
        other 0.001 0.01 1
        other, no decay 0.001 0.0 1
        >>> optimiser = torch.optim.AdamW(groups)

    Source:
        b_lr_ratio: LoRA+, Hayou et al., arXiv 2402.12354.
    """
    rates = {"core_lr": core_lr, "magnitude_lr": magnitude_lr, "rotation_lr": rotation_lr, "other_lr": other_lr}
    decays = {"magnitude_weight_decay": magnitude_weight_decay, "rotation_weight_decay": rotation_weight_decay}
    given = {name: rate for name, rate in rates.items() if rate is not None}
    _check_numbers({"lr": lr, "weight_decay": weight_decay, **given, **decays}, b_lr_ratio)
    other = given.get("other_lr", lr)
    settings: dict[str, tuple[float, float]] = {
        Role.INPUT_FACTOR: (lr, weight_decay),
        Role.OUTPUT_FACTOR: (lr * b_lr_ratio, weight_decay),
        Role.UPDATE: (lr, weight_decay),
        Role.CORE: (given.get("core_lr", lr), weight_decay),
        Role.MAGNITUDE: (given.get("magnitude_lr", lr), magnitude_weight_decay),
        Role.ROTATION: (given.get("rotation_lr", lr), rotation_weight_decay),
        _OTHER: (other, weight_decay),
        _OTHER_NO_DECAY: (other, 0.0),
    }
    members = trained(model)
    starts = _starts(model, members) if scale_aware else {}
    found: dict[str, dict[str | None, dict[str, Any]]] = {kind: {} for kind in settings}
    for item in members:
        kind, start = _kind(item), starts.get(id(item.parameter))
        name = str(kind) if start is None else f"{kind} x {start:g}"
        rate, decay = settings[kind]
        fresh = {"params": [], "name": name, "lr": rate * (1 if start is None else start), "weight_decay": decay}
        found[kind].setdefault(name, fresh)["params"].append(item.parameter)
    return [group for groups in found.values() for group in groups.values()]


def trained(model: nn.Module) -> list[Trained]:
    """Every parameter that trains, once, in the model's order, with its role.

    Raises:
        TrainingError, MergedError: as `param_groups`.
    """
    owners: dict[int, list[Trained]] = {}
    problems: list[str] = []
    inside = _insides(model)
    for prefix, module in model.named_modules():
        if isinstance(module, Adapter):
            problems += _lost(prefix, module)
        for name, parameter in module._parameters.items():
            if parameter is None or not trains(parameter):
                continue
            item = Trained(f"{prefix}.{name}" if prefix else name, parameter, _role(module, name))
            if id(module) in inside and item.role is None:
                problems.append(f"{item.name} is in an adapter and has no role; freeze it, or let its piece declare it")
            owners.setdefault(id(parameter), []).append(item)
    problems += [_shared(items) for items in owners.values() if len({item.role for item in items}) > 1]
    if problems:
        raise TrainingError(f"the roles of these parameters are not clear:{listing(problems)}")
    if not owners:
        raise TrainingError(
            f"nothing of this {type(model).__name__} trains; adapt(model, spec) adds what does, "
            "and parameter.requires_grad_(True) thaws what is there"
        )
    _check_unmerged(model)
    return [items[0] for items in owners.values()]


def _role(module: nn.Module, name: str) -> Role | None:
    return module.roles.get(name) if isinstance(module, Adapter) else None


def _kind(item: Trained) -> str:
    """The group that a parameter belongs to. Biases and norms don't decay, as is the custom."""
    if item.role is not None:
        return item.role
    return _OTHER if item.parameter.dim() >= 2 else _OTHER_NO_DECAY


def _insides(model: nn.Module) -> set[int]:
    """Ids of all modules in adapters, whatever else someone has put there."""
    return {id(part) for module in model.modules() if isinstance(module, Adapter) for part in module.modules()}


def _lost(prefix: str, adapter: Adapter) -> Iterator[str]:
    """What an adapter declares and no longer has as a parameter of its own."""
    for name, role in adapter.roles.items():
        if role is not Role.BUFFER and name not in adapter._parameters:
            yield (
                f"{prefix}.{name} was replaced by something else; undo pruning and parametrisations, "
                "and give FSDP use_orig_params=True"
            )


def _shared(items: Sequence[Trained]) -> str:
    uses = ", ".join(f"{item.name} ({item.role or 'outside adapters'})" for item in items)
    return f"one parameter has several uses: {uses}; copy it, or freeze it"


def _check_unmerged(model: nn.Module) -> None:
    merged = [
        name
        for name, layer in adapted_layers(model).items()
        if layer.merged and any(map(trains, layer.adapter.parameters()))
    ]
    if merged:
        raise MergedError(
            "merged layers get no gradient: unmerge these before training, or freeze their adapters "
            f"(layer.adapter.requires_grad_(False)):{listing(merged)}"
        )


def _check_numbers(numbers: Mapping[str, object], ratio: object) -> None:
    problems = [f"{name}={value!r}: a finite number ≥ 0" for name, value in numbers.items() if not _is_number(value)]
    if not (_is_number(ratio) and ratio):
        problems.append(f"b_lr_ratio={ratio!r}: a finite number > 0")
    if problems:
        raise TrainingError(f"not valid, and what would be:{listing(problems)}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf


# Note [The start is the piece's own]
# The factor of a magnitude comes from what its piece would start it at on the base weight, never from its value now:
# groups that are built late, or again to load an optimiser's state into, have to be the same. It is rounded to six
# digits: norms that another device sums in another order give the same groups, and names of groups are unique, as
# Lightning's LearningRateMonitor wants them.
def _starts(model: nn.Module, members: Sequence[Trained]) -> dict[int, float]:
    """The root mean square of every magnitude's start, by the parameter's id; 1 for a start of 0."""
    wanted = {id(item.parameter): item.name for item in members if item.role is Role.MAGNITUDE}
    starts: dict[int, float] = {}
    for layer in adapted_layers(model).values():
        for part in layer.adapter.parts():
            own = {name: id(p) for name, p in part.named_parameters(recurse=False) if id(p) in wanted}
            values = _initial(layer, part) if own else {}
            for name, key in own.items():
                start = _size(values[name], wanted[key])
                if starts.setdefault(key, start) != start:
                    raise TrainingError(f"{wanted[key]} is shared by layers where it starts at different sizes")
    lost = [name for key, name in wanted.items() if key not in starts]
    if lost:
        raise TrainingError(f"scale_aware needs the adapted layers; these adapters are in none:{listing(lost)}")
    return starts


@torch.no_grad()
def _initial(layer: AdaptedLinear, part: Adapter) -> Mapping[str, Tensor]:
    if layer.weight.is_meta:
        raise UninitialisedError(layer.name)
    return initial_values(part.spec, replace(layer.site(), depth=part.spec.depth))


def _size(value: Tensor, name: str) -> float:
    size = float(value.detach().cpu().double().square().mean().sqrt())
    if not math.isfinite(size):
        raise TrainingError(f"{name} would start at a size of {size}: the base weight is not finite")
    return float(f"{size:.6g}") or 1.0
