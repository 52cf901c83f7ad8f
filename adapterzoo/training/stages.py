"""Stages: train sets of parameters in turns, by role; without them all train jointly."""

import gc
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

from torch import Tensor, distributed, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from adapterzoo.errors import TrainingError, did_you_mean, listing
from adapterzoo.pieces import Role
from adapterzoo.training.groups import Trained, trained
from adapterzoo.training.optimisers import plain_optimizer, was_skipped
from adapterzoo.watch import ASLEEP, is_blank

Stage = str | Sequence[str]

_STEP = "adapterzoo_stage_step"
_DIRECTION = frozenset({Role.INPUT_FACTOR, Role.OUTPUT_FACTOR, Role.UPDATE, Role.CORE})
_ROLES: dict[str, frozenset[Role]] = {
    "direction": _DIRECTION,
    **{role.value: frozenset({role}) for role in Role if role is not Role.BUFFER},
}


def stages(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    order: Sequence[Stage] = ("direction", "magnitude"),
    steps: int | Sequence[int],
    cycle: bool = True,
) -> "Stages":
    """Train sets of parameters in turns, from now on. Without this call everything trains jointly.

    Parameters whose role is in some stage sleep while another one trains: they get no gradient, so neither momentum nor
    decay moves them, and clipping does not count them. What is in no stage, such as a head, always trains.

    A turn is counted in steps of the optimiser: accumulated micro-batches and evaluations of a closure are one step, a
    step that a GradScaler skips is none. The count is part of `optimizer.state_dict()`, and after
    `optimizer.load_state_dict`, before or after this call, training goes on where it was, bit for bit.

    Args:
        model: a model with adapted layers.
        optimizer: the torch optimiser that trains it, or accelerate's or Lightning's wrapper of it. L-BFGS, which has
            one memory for all parameters, begins a new one at each turn.
        order: the stages. Each is a role ("magnitude", "rotation", "core", "direction.input", "direction.output",
            "direction.dense"), "direction" for all that a generator has (the last four), or a tuple of these, which
            train together.
        steps: how many steps a turn has: one number, or one for each stage.
        cycle: begin again after the last stage; False stays in the last one.

    Returns:
        The handle, which is a context manager too. The stages go on without it, until `detach()`.

    Raises:
        TrainingError: a stage that is no role, or one that no parameter has; a number that is not ≥ 1; an optimiser
            that does not hold a staged parameter; stages on a model that has some; or as `param_groups`. Nothing was
            changed. In a step: torch.distributed was started after this call.
        MergedError: an adapter that trains in a layer that is merged.

    Example:
        >>> import torch
        >>> from adapterzoo import MAP, LoRA, adapt, param_groups, stages
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
        >>> plan = adapt(model, MAP(LoRA(r=2)))
        >>> optimizer = torch.optim.AdamW(param_groups(model, 1e-3))
        >>> with stages(model, optimizer, steps=(2, 1)) as turns:
        ...     for _ in range(4):
        ...         print(turns.step, turns.stage)
        ...         model(torch.ones(8)).square().sum().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        0 direction
        1 direction
        2 magnitude
        3 direction

    Source:
        Joint against stepwise training of α, β and ΔW: MAP, arXiv 2505.23094, Table 3.
    """
    plan = _schedule(order, steps, cycle)
    plain, members = plain_optimizer(optimizer), trained(model)
    _check_roles(plan, members)
    staged = [item for item in members if any(item.role in roles for roles in plan.roles)]
    _check_free(staged)
    _check_held(staged, plain)
    return Stages(plain, plan, staged)


@dataclass(frozen=True)
class Schedule:
    """Which stage a step belongs to."""

    order: tuple[str | tuple[str, ...], ...]
    steps: tuple[int, ...]
    cycle: bool

    @property
    def roles(self) -> list[frozenset[Role]]:
        """The roles of each stage."""
        return [frozenset().union(*(_ROLES[name] for name in _names(stage))) for stage in self.order]

    def index(self, step: int) -> int:
        """The place in `order` of the stage that trains after so many steps."""
        step = step % sum(self.steps) if self.cycle else step
        return next((i for i, end in enumerate(accumulate(self.steps)) if step < end), len(self.order) - 1)


class Stages:
    """What `stages` returns: which stage trains. `detach()` ends them.

    Until then the flags `requires_grad` of staged parameters are theirs.

    Args:
        optimizer: a plain torch optimiser.
        schedule: which stage a step belongs to.
        staged: every parameter that is in a stage.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule, staged: Sequence[Trained]) -> None:
        self._optimizer, self._schedule = optimizer, schedule
        self._asleep = [[item.parameter for item in staged if item.role not in roles] for roles in schedule.roles]
        self._sleepers = Sleepers([item.parameter for item in staged])
        self._blank, self._last = False, 0
        # Where the optimiser and this handle are dropped without a detach, the parameters wake all the same.
        self._release = weakref.finalize(self, self._sleepers.release)
        self._release.atexit = False
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_post_hook(self._follow),
        ]
        self._follow()

    @property
    def step(self) -> int:
        """How many steps the optimiser has taken in these stages, resumptions included."""
        return int(self._optimizer.param_groups[0].get(_STEP, 0)) if self._release.alive else self._last

    @property
    def stage(self) -> str | tuple[str, ...]:
        """The stage that trains now, as `order` has it."""
        return self._schedule.order[self._schedule.index(self.step)]

    def detach(self) -> None:
        """End the stages: everything that was staged trains again, jointly. A second call does nothing."""
        if not self._release.alive:
            return  # the count may be that of later stages
        self._last = self.step
        self._optimizer.param_groups[0].pop(_STEP, None)
        for handle in self._handles:
            handle.remove()
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._sleepers.check_processes()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._gradients_are_ready()
            return None
        if len(args) > 1:
            return (args[0], self._watched(closure), *args[2:]), kwargs
        return args, {**kwargs, "closure": self._watched(closure)}

    def _watched(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            self._sleepers.after_step()
            loss = closure()
            self._gradients_are_ready()
            return loss

        return evaluate

    def _gradients_are_ready(self) -> None:
        self._blank = is_blank(self._optimizer)
        if self._blank and not self._optimizer.state:  # torch's distributed checkpoints make state in this way
            self._sleepers.keep_flags()
        else:
            self._sleepers.before_step()

    def _after_step(self, *_: Any) -> None:
        self._sleepers.after_step()
        if self._blank or was_skipped(self._optimizer):
            return
        before = self.stage
        self._optimizer.param_groups[0][_STEP] = self.step + 1
        self._follow()
        if isinstance(self._optimizer, LBFGS) and self.stage != before:
            for state in self._optimizer.state.values():
                state["n_iter"] = 0  # its directions would move what sleeps now

    def _follow(self, *_: Any) -> None:
        """Put to sleep what the count says, which may just have been loaded."""
        step = self._optimizer.param_groups[0].setdefault(_STEP, 0)
        self._sleepers.sleep(self._asleep[self._schedule.index(step)])


# Note [Two ways to sleep]
# By its flag, which saves the work for its gradient. But DDP fixes when it is built which parameters will have a
# gradient: it raises where one of them stays without, and never sums one that sleeps just then, so that processes drift
# apart without a word. And torch's distributed checkpoints load no state of a parameter without the flag. So where
# there are processes or such checkpoints, the flag stays, and a gradient is zeroed as soon as it is there, before DDP,
# FSDP2 or clipping see it. It is dropped before the step; in the step the flag is off, for other hooks that would give
# it a gradient.
class Sleepers:
    """Parameters, some of which sleep: no gradient reaches an optimiser's step.

    Args:
        staged: all of them, which train.
    """

    def __init__(self, staged: Sequence[nn.Parameter]) -> None:
        self._staged = list(staged)
        self._many = self._by_zeros = _processes()
        self._asleep: dict[nn.Parameter, RemovableHandle | None] = {}
        ASLEEP.update(map(id, staged))

    def sleep(self, wanted: Iterable[nn.Parameter]) -> None:
        """Let these sleep, and wake all others."""
        chosen = dict.fromkeys(wanted)
        for parameter in [p for p in self._asleep if p not in chosen]:
            self._wake(parameter)
        for parameter in [p for p in chosen if p not in self._asleep]:
            parameter.grad = None
            parameter.requires_grad_(self._by_zeros)
            self._asleep[parameter] = _zeroed(parameter) if self._by_zeros else None

    def before_step(self) -> None:
        """Drop what gradients there are."""
        for parameter in self._asleep:
            parameter.grad = None
            parameter.requires_grad_(False)

    def after_step(self) -> None:
        """Undo what `before_step` did to the flags."""
        if self._by_zeros:
            for parameter in self._asleep:
                parameter.requires_grad_(True)

    def keep_flags(self) -> None:
        """Sleep with the flag on, from now on."""
        if self._by_zeros:
            return
        asleep, self._by_zeros = list(self._asleep), True
        self.sleep([])
        self.sleep(asleep)

    def release(self) -> None:
        """Wake all, for good."""
        for parameter in list(self._asleep):
            self._wake(parameter)
        ASLEEP.difference_update(map(id, self._staged))

    def check_processes(self) -> None:
        """Raise a TrainingError if several processes train, and did not when the first parameter went to sleep."""
        if _processes() and not self._many:
            raise TrainingError(
                "torch.distributed was started after stages(...), so gradients of what slept may not be summed "
                "over the processes when it wakes; call stages after torch.distributed.init_process_group"
            )

    def _wake(self, parameter: nn.Parameter) -> None:
        handle = self._asleep.pop(parameter)
        if handle is not None:
            handle.remove()
        parameter.requires_grad_(True)


def _processes() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _zeroed(parameter: nn.Parameter) -> RemovableHandle:
    """Set the gradient of a parameter to zero whenever there is one."""

    def zero(value: Tensor) -> None:
        if value.grad is not None:
            value.grad.zero_()

    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(zero)  # type: ignore[no-untyped-call]
    return handle


def _names(stage: Stage) -> tuple[str, ...]:
    return (stage,) if isinstance(stage, str) else tuple(stage)


def _schedule(order: Sequence[Stage], steps: int | Sequence[int], cycle: bool) -> Schedule:
    """The schedule; raise a TrainingError unless every name is one, and every number is ≥ 1."""
    if isinstance(order, str) or not isinstance(order, Sequence) or not order or not all(map(_is_stage, order)):
        raise TrainingError(
            f"order={order!r} is not valid: it should be a sequence of stages, each a role or a tuple of roles, "
            "such as ('direction', 'magnitude')"
        )
    for name in (name for stage in order for name in _names(stage)):
        if name not in _ROLES:
            raise TrainingError(f"no role {name!r}; roles: {', '.join(_ROLES)}{did_you_mean(name, _ROLES)}")
    numbers = [steps] * len(order) if isinstance(steps, int) else steps
    if not isinstance(numbers, Sequence) or len(numbers) != len(order) or not all(map(_is_count, numbers)):
        raise TrainingError(
            f"steps={steps!r} is not valid: it should be a whole number ≥ 1, or one for each of the {len(order)} stages"
        )
    stages = tuple(stage if isinstance(stage, str) else tuple(stage) for stage in order)
    return Schedule(stages, tuple(numbers), bool(cycle))


def _is_stage(stage: object) -> bool:
    if isinstance(stage, str):
        return True
    return isinstance(stage, Sequence) and len(stage) > 0 and all(isinstance(name, str) for name in stage)


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def _check_roles(schedule: Schedule, members: Sequence[Trained]) -> None:
    present = {item.role for item in members if item.role is not None}
    known = [name for name, roles in _ROLES.items() if roles & present]
    for name in (name for stage in schedule.order for name in _names(stage)):
        if name not in known:
            raise TrainingError(
                f"no parameter that trains has the role {name!r}; here are {', '.join(known) or 'no adapters'}"
                f"{did_you_mean(name, known)}"
            )


def _check_free(staged: Sequence[Trained]) -> None:
    """Raise a TrainingError if other stages have these parameters; those of an optimiser that is gone don't count."""
    if any(id(item.parameter) in ASLEEP for item in staged):
        gc.collect()
    taken = [item.name for item in staged if id(item.parameter) in ASLEEP]
    if taken:
        raise TrainingError(f"these parameters have stages already; detach() those first:{listing(taken)}")


def _check_held(staged: Sequence[Trained], optimizer: Optimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [item.name for item in staged if id(item.parameter) not in held]
    if missing:
        raise TrainingError(
            "the optimiser does not hold these parameters; build it from param_groups(model, lr), after adapt:"
            f"{listing(missing)}"
        )
