"""attach: what the pieces of a model need at every step of an optimiser is done, whoever writes the loop."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adapterzoo.adapter import Adapter
from adapterzoo.errors import ImportanceWarning, where
from adapterzoo.layer import AdaptedLinear
from adapterzoo.rules import Member, Report, StepRule
from adapterzoo.training.held import NO_PULL, pull_of_norms
from adapterzoo.training.optimisers import (
    before_every_step,
    loss_scale,
    plain_optimizer,
    uncompiled,
    was_skipped,
)
from adapterzoo.training.penalty import gradients_of_total, penalised
from adapterzoo.training.ready import check, check_steps, earlier_attachments, ruled_pieces, trained_layers
from adapterzoo.watch import WATCH, is_blank, trains

_STEP = "adapterzoo_step"


def attach(model: nn.Module, optimizer: Optimizer, *, total_steps: int, add_penalty: bool = True) -> "Attachment":
    """Do what the pieces of a model need at every step of an optimiser, from now on: AdaLoRA's rank allocation.

    Call it after the optimiser is built and before the first step; a later call takes the place of an earlier one for
    the same layers. It hooks `optimizer.step`, so it works in any
    loop and trainer, with closures, accumulated gradients, gradient scalers and clipping. Everything that it remembers
    is part of the optimiser's state: `optimizer.state_dict()` saves it, and after `optimizer.load_state_dict` (before
    or after this call) training goes on bit for bit as it would have.

    Args:
        model: a model with adapted layers.
        optimizer: the torch optimiser that trains them, or accelerate's or Lightning's wrapper of it.
        total_steps: how many steps the optimiser is going to take in all, steps before a resumption included.
        add_penalty: add the gradient of the penalties that the pieces declare (AdaLoRA's orthogonality) to `.grad`
            right before each step: once a step, after any clipping. False leaves that to the loop:
            `loss = task_loss + adapterzoo.penalty(model)`.

    Returns:
        The attachment. It may be dropped: the hooks stay as long as the optimiser does, or until `detach()`.

    Raises:
        TrainingError: total_steps is no whole number ≥ 1 or leaves a schedule no room, no adapted layer that trains,
            one that is merged, parameters that the optimiser does not hold, or an optimiser that is attached to layers
            of another model. Nothing was changed.

    Example:
        >>> import torch
        >>> import adapterzoo as az
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
        >>> plan = az.adapt(model, az.AdaLoRA(r=4, target_r=2))
        >>> optimizer = torch.optim.AdamW(az.param_groups(model, lr=1e-2))
        >>> _ = az.attach(model, optimizer, total_steps=10)
        >>> for _ in range(10):
        ...     model(torch.ones(1, 8)).square().sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> sum(az.ranks(model).values())
        4

    Source:
        AdaLoRA: Zhang et al., arXiv 2303.10512, algorithm 1.
    """
    plain = plain_optimizer(optimizer)
    layers = trained_layers(model, plain)
    check(layers, plain, check_steps(total_steps))
    for earlier in earlier_attachments(layers, plain):
        earlier.detach()
    return Attachment(plain, layers, total_steps, penalised(model) if add_penalty else [])


class Attachment:
    """What `attach` returns: where training stands. `detach()` takes the hooks off.

    Args:
        optimizer: a plain torch optimiser.
        layers: the layers whose adapters train, by name.
        total_steps: as `attach` takes it.
        penalties: the pieces whose penalties are added, and how many siblings each has.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        layers: Mapping[str, AdaptedLinear],
        total_steps: int,
        penalties: Sequence[tuple[Adapter, int]],
    ) -> None:
        self.optimizer, self.total_steps = optimizer, total_steps
        self.layers = list(layers.values())
        self.in_step = False
        self.report: dict[str, Tensor | float] = {}
        """What the rules said of the last step, summed over rules: for AdaLoRA its `budget`, and two `importance…`."""
        self._ruled = ruled_pieces(layers)
        self._penalised = penalties
        self._grads: dict[int, Tensor] = {}
        self._penalty_grads: dict[int, Tensor] = {}
        self._seen: list[tuple[Tensor, int]] = []
        self._blank = self._told = False
        # Hooks are no part of a compiled step: what they do depends on the count.
        self._handles = [
            before_every_step(optimizer, uncompiled(self._before_step)),
            optimizer.register_step_post_hook(uncompiled(self._after_step)),
        ]
        for layer in self.layers:
            WATCH.attend(layer, self)

    @property
    def step(self) -> int:
        """How many steps the optimiser has taken since it was first attached, resumptions included."""
        return max(int(group.get(_STEP, 0)) for group in self.optimizer.param_groups)

    @property
    def adds_penalty(self) -> bool:
        """Whether it adds penalties to the gradients."""
        return bool(self._penalised)

    @property
    def penalty_share(self) -> float:
        """The share of the last step's importance that came from penalties.

        NaN before the first step, after the last allocation, and where penalties are not added here.
        """
        task, penalty = (float(self.report.get(name, 0.0)) for name in ("importance", "importance_of_penalty"))
        return penalty / (task + penalty) if self.adds_penalty and task + penalty > 0 else float("nan")

    @property
    def finished(self) -> bool:
        """Whether every rule has reached its end: nothing but the optimiser changes the adapters any more."""
        return all(rule.finished(self.step, self.total_steps) for rule in self._ruled)

    def detach(self) -> None:
        """Take the hooks off. What was done stays, in the model and in the optimiser's state."""
        for handle in self._handles:
            handle.remove()
        for layer in self.layers:
            WATCH.leave(layer, self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @torch.no_grad()
    def _before_step(self) -> Tensor | None:
        """Gradients are ready: add the penalties' own, and keep what the rules will need."""
        if self._is_prepared():
            return None
        self.in_step, self._grads, self._penalty_grads = True, {}, {}
        self._blank = is_blank(self.optimizer)
        if self._blank:
            return None
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        scale = loss_scale(self.optimizer)
        value = self._add_penalties(held, scale)
        for layer, part in self._measured():
            self._keep_gradients(layer, part, held, scale)
        self._seen = self._versions()
        return value

    def _add_penalties(self, held: set[int], scale: Tensor | None) -> Tensor | None:
        """Add the penalties' gradient to that of every piece that took part in the step; their sum, None if none did.

        A parameter without a gradient gets none: an expert that was not routed to stays as it is.
        """
        pieces, wanted = [], []
        for part, siblings in self._penalised:
            trained = [p for p in part.parameters(recurse=False) if p.grad is not None and id(p) in held]
            wanted += trained
            pieces += [(part, siblings)] if trained else []
        if not wanted:
            return None
        *grads, total = gradients_of_total(pieces, wanted)
        for parameter, grad in zip(wanted, grads, strict=True):
            assert parameter.grad is not None
            if grad is not None:
                self._penalty_grads[id(parameter)] = grad
                parameter.grad.add_(grad if scale is None else grad * scale)
        return total

    def _keep_gradients(self, layer: AdaptedLinear, part: Adapter, held: set[int], scale: Tensor | None) -> None:
        """Keep the gradients of a piece, with gains held, before the optimiser may change them."""
        pull = pull_of_norms(layer) if part is layer.adapter.generator else NO_PULL
        if pull.unknown and not self._told:
            self._told = True
            warnings.warn(
                f"{where(layer.name)}: {', '.join(pull.unknown)} got no gradient, so importance can't be measured with "
                "gains held (docs/training.md, 'What importance means'); let magnitudes train jointly with the rest "
                "while ranks are allocated",
                ImportanceWarning,
                stacklevel=2,
            )
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.grad is not None and id(parameter) in held:
                grad = parameter.grad + pull.grads[name] if name in pull.grads else parameter.grad.clone()
                self._grads[id(parameter)] = grad if scale is None else grad / scale

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        if not self.in_step:
            return
        self.in_step = False
        if was_skipped(self.optimizer):
            return
        step = self.step + (not self._blank)
        for group in self.optimizer.param_groups:
            group[_STEP] = step
        if not self._blank:
            self.report = self._run(lambda rule, members: rule.step(members, step, self.total_steps))
        else:  # no step, but a checkpoint may be about to fill what is there already
            self._run(lambda rule, members: rule.begin(members))
        self._grads, self._penalty_grads, self._seen = {}, {}, []

    def _run(self, call: Callable[[StepRule, list[Member]], Report | None]) -> dict[str, Tensor | float]:
        """Call every rule with the pieces that train; what they say, summed."""
        said: dict[str, Tensor | float] = {}
        for rule, entries in self._ruled.items():
            members = [self._member(layer, part) for layer, part in entries if any(map(trains, part.parameters(False)))]
            for name, value in ((call(rule, members) if members else None) or {}).items():
                said[name] = said[name] + value if name in said else value
        return said

    def _measured(self) -> Iterator[tuple[AdaptedLinear, Adapter]]:
        """The pieces whose rule still looks at gradients."""
        step = self.step
        for rule, entries in self._ruled.items():
            if not rule.finished(step, self.total_steps):
                yield from entries

    def _member(self, layer: AdaptedLinear, part: Adapter) -> Member:
        own = dict(part.named_parameters(recurse=False))

        def known(grads: Mapping[int, Tensor]) -> dict[str, Tensor]:
            return {name: grads[id(parameter)] for name, parameter in own.items() if id(parameter) in grads}

        # The optimiser's state of a parameter is its own to begin: Adam starts it at the first step with a gradient, a
        # blank one too, and SGD without momentum never does.
        stepped = {name for name, p in own.items() if id(p) in self._grads or (self._blank and p.grad is not None)}
        started = {name: p for name, p in own.items() if name in stepped or p in self.optimizer.state}
        memory = {name: self.optimizer.state[p] for name, p in started.items()}
        return Member(
            layer.name,
            part.spec,
            MappingProxyType(part.values()),
            known(self._grads),
            known(self._penalty_grads),
            memory,
        )

    def _is_prepared(self) -> bool:
        """Whether gradients are as they were left: in a step inside of a step, and when a failed one is tried again."""
        now = self._versions()
        return (
            self.in_step
            and not self._blank
            and len(now) == len(self._seen)
            and all(a is b and v == w for (a, v), (b, w) in zip(now, self._seen, strict=True))
        )

    def _versions(self) -> list[tuple[Tensor, int]]:
        grads = [p.grad for layer in self.layers for p in layer.adapter.parameters() if p.grad is not None]
        return [(grad, grad._version) for grad in grads]
