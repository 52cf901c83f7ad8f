"""What every torch optimiser has in common: wrappers around it, closures, loss scales, steps that are none."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from adapterzoo.errors import TrainingError

Hook = Callable[..., Any]


def plain_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimiser inside whatever a trainer has wrapped around it (accelerate, Lightning).

    Raises:
        TrainingError: there is none inside.
    """
    seen = optimizer
    while isinstance(getattr(seen, "optimizer", None), Optimizer):
        seen = seen.optimizer
    if hasattr(seen, "consolidate_state_dict"):
        raise TrainingError(
            f"a {type(seen).__name__} keeps its state in an optimiser of its own, and would not save what attach "
            "remembers; use FSDP2 (torch.distributed.fsdp.fully_shard) to shard it, or a plain optimiser"
        )
    if not isinstance(seen, Optimizer):
        raise TrainingError(f"a torch.optim.Optimizer is needed, or a wrapper of one; got {type(optimizer).__name__}")
    return seen


def before_every_step(optimizer: Optimizer, prepare: Callable[[], Any]) -> Any:
    """Call `prepare` whenever gradients are ready: before a step, or after each evaluation of the step's closure.

    `prepare` returns what it adds to the loss, or None; a closure's value then has it too.

    Returns:
        The handle that removes the hook.
    """

    def hook(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            prepare()
            return None

        def closure_and_more() -> Any:
            loss = closure()
            more = prepare()
            return loss + more if isinstance(loss, (torch.Tensor, float)) and more is not None else loss

        if len(args) > 1:
            return (args[0], closure_and_more, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_and_more}

    return optimizer.register_step_pre_hook(hook)


def uncompiled(hook: Hook) -> Hook:
    """The hook as no part of a compiled step: what it does depends on how many steps there were."""
    return torch.compiler.disable(hook)  # type: ignore[no-any-return, no-untyped-call]


def loss_scale(optimizer: Optimizer) -> torch.Tensor | None:
    """What gradients are still multiplied by in a step: a GradScaler leaves it to fused optimisers to divide."""
    return getattr(optimizer, "grad_scale", None)


def was_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimiser has left everything as it was, since a GradScaler found gradients that are infinite."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
