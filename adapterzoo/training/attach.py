"""attach: what the pieces of a model need at every step of an optimiser is done, whoever writes the loop."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Self
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adapterzoo.adapter import Adapter
from adapterzoo.errors import TrainingError, listing, where
from adapterzoo.layer import AdaptedLinear, adapted_layers
from adapterzoo.rules import Member, StepRule
from adapterzoo.training.held import pull_of_norms
from adapterzoo.training.optimisers import before_every_step, is_blank, loss_scale, plain_optimizer, was_skipped
from adapterzoo.training.penalty import ADDED_BY_ATTACH, penalised, term_of
from adapterzoo.watch import WATCH, needing

_STEP = "adapterzoo_step"
_ATTACHED: WeakKeyDictionary[AdaptedLinear, "ref[Attachment]"] = WeakKeyDictionary()


def attach(model: nn.Module, optimizer: Optimizer, *, total_steps: int, add_penalty: bool = True) -> "Attachment":
    """Do what the pieces of a model need at every step of an optimiser, from now on: AdaLoRA's rank allocation.

    Call it once, after the optimiser is built and before the first step. It hooks `optimizer.step`, so it works in any
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
        TrainingError: total_steps is no whole number ≥ 1 or leaves a schedule no room, no adapted layer, one that is
            merged or attached already, or parameters that the optimiser does not hold. Nothing was changed.

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
    return Attachment(model, plain_optimizer(optimizer), _steps(total_steps), add_penalty)


class Attachment:
    """What `attach` returns: where training stands. `detach()` takes the hooks off.

    Args:
        model, optimizer, total_steps, add_penalty: as `attach` takes them.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, total_steps: int, add_penalty: bool) -> None:
        layers = adapted_layers(model)
        if not layers:
            raise TrainingError(f"this {type(model).__name__} has no adapted layer; adapt(model, spec) makes them")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = {name: layer for name, layer in layers.items() if _is_trained(layer, held)}
        _check(trained, held, total_steps)
        self.optimizer, self.total_steps = optimizer, total_steps
        self.layers = list(trained.values())
        self.report: Mapping[str, Tensor | float] = {}
        self._ruled = _ruled(trained)
        self._penalised = penalised(model) if add_penalty else []
        self._grads: dict[int, Tensor] = {}
        self._penalty_grads: dict[int, Tensor] = {}
        self._ready = False
        self._handles = [
            before_every_step(optimizer, self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        for layer in self.layers:
            _ATTACHED[layer] = ref(self)  # the optimiser's hooks keep it alive
            WATCH.attended(layer)
            if add_penalty:
                ADDED_BY_ATTACH.add(layer)

    @property
    def step(self) -> int:
        """How many steps the optimiser has taken since it was first attached, resumptions included."""
        return int(self.optimizer.param_groups[0].get(_STEP, 0))

    @property
    def penalty_share(self) -> float:
        """The share of the last step's importance that came from penalties; NaN before a step, or if not added here."""
        return float(self.report.get("penalty_share", float("nan"))) if self._penalised else float("nan")

    @property
    def finished(self) -> bool:
        """Whether every rule has reached its end: nothing but the optimiser changes the adapters any more."""
        return all(rule.finished(self.step, self.total_steps) for rule in self._ruled)

    def detach(self) -> None:
        """Take the hooks off. What was done stays, in the model and in the optimiser's state."""
        for handle in self._handles:
            handle.remove()
        for layer in self.layers:
            _ATTACHED.pop(layer, None)
            ADDED_BY_ATTACH.discard(layer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @torch.no_grad()
    def _before_step(self) -> Tensor | None:
        """Gradients are ready: add the penalties' own, and keep what the rules will need."""
        self._ready = not is_blank(self.optimizer)
        if not self._ready:
            return None
        scale = loss_scale(self.optimizer)
        value = self._add_penalties(scale)
        self._grads = {}
        for layer, part in (entry for entries in self._ruled.values() for entry in entries):
            pull = pull_of_norms(layer) if part is layer.adapter.generator else {}
            for name, parameter in part.named_parameters(recurse=False):
                if parameter.grad is not None:
                    grad = parameter.grad + pull[name] if name in pull else parameter.grad.clone()
                    self._grads[id(parameter)] = grad if scale is None else grad / scale
        return value

    def _add_penalties(self, scale: Tensor | None) -> Tensor | None:
        """Add the penalties' gradient to that of every parameter that trains; their sum, or None if there are none."""
        total, self._penalty_grads = None, {}
        for part, siblings in self._penalised:
            trained = [p for p in part.parameters(recurse=False) if p.requires_grad]
            if not trained:
                continue
            with torch.enable_grad():
                term = term_of(part, siblings)
                grads = torch.autograd.grad(term, trained, allow_unused=True)
            for parameter, grad in zip(trained, grads, strict=True):
                if grad is not None:
                    self._penalty_grads[id(parameter)] = grad
                    grad = grad if scale is None else grad * scale
                    parameter.grad = grad.clone() if parameter.grad is None else parameter.grad.add_(grad)
            total = term.detach() if total is None else total + term.detach().to(total.device)
        return total

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        if not self._ready or was_skipped(self.optimizer):
            return
        self._ready = False
        step = self.step + 1
        self.optimizer.param_groups[0][_STEP] = step
        report: dict[str, Tensor | float] = {}
        for rule, entries in self._ruled.items():
            report |= rule.step([self._member(layer, part) for layer, part in entries], step, self.total_steps)
        self.report = report
        self._grads, self._penalty_grads = {}, {}

    def _member(self, layer: AdaptedLinear, part: Adapter) -> Member:
        own = dict(part.named_parameters(recurse=False))

        def known(grads: Mapping[int, Tensor]) -> dict[str, Tensor]:
            return {name: grads[id(parameter)] for name, parameter in own.items() if id(parameter) in grads}

        # The optimiser's state of a parameter is its own to begin: Adam starts it at the first step with a gradient.
        started = {name: p for name, p in own.items() if id(p) in self._grads or p in self.optimizer.state}
        memory = {name: self.optimizer.state[p] for name, p in started.items()}
        return Member(layer.name, part.spec, part.values(), known(self._grads), known(self._penalty_grads), memory)


def attachment_of(layer: AdaptedLinear) -> Attachment | None:
    """Who attends to a layer."""
    found = _ATTACHED.get(layer)
    return None if found is None else found()


def _steps(total_steps: object) -> int:
    if isinstance(total_steps, int) and not isinstance(total_steps, bool) and total_steps >= 1:
        return total_steps
    raise TrainingError(
        f"total_steps={total_steps!r} is not valid: it should be the number of steps that the optimiser is going to "
        "take in all, a whole number ≥ 1"
    )


def _is_trained(layer: AdaptedLinear, held: set[int]) -> bool:
    """Whether an adapter trains: some parameter of it is in the optimiser, or wants a gradient."""
    return any(p.requires_grad or id(p) in held for p in layer.adapter.parameters())


def _ruled(layers: Mapping[str, AdaptedLinear]) -> dict[StepRule, list[tuple[AdaptedLinear, Adapter]]]:
    """The pieces with a step rule, by their rule."""
    found: dict[StepRule, list[tuple[AdaptedLinear, Adapter]]] = defaultdict(list)
    for layer in layers.values():
        for part in layer.adapter.parts():
            rule = part.spec.step_rule()
            if rule is not None:
                found[rule].append((layer, part))
    return dict(found)


def _check(layers: Mapping[str, AdaptedLinear], held: set[int], total_steps: int) -> None:
    """Raise a TrainingError that lists all that stands against attaching."""
    problems = []
    for name, layer in layers.items():
        strangers = [n for n, p in layer.adapter.named_parameters() if id(p) not in held and _is_needed(layer, p)]
        if attachment_of(layer) is not None:
            problems.append(f"{where(name)} is attached already; detach() the earlier attachment first")
        elif layer.merged:
            problems.append(f"{where(name)} is merged and can't be trained; unmerge it first")
        elif strangers:
            problems.append(
                f"{where(name)} has parameters that the optimiser does not hold ({', '.join(strangers)}); "
                "build it from adapterzoo.param_groups(model, lr=...), after adapt"
            )
    for rule, entries in _ruled(layers).items():
        misfit = rule.misfit(total_steps)
        if misfit:
            problems.append(f"{where(entries[0][0].name)}, {entries[0][1].spec!r}: {misfit}")
    if problems:
        raise TrainingError(f"attach can't do what this model needs:{listing(problems)}")


def _is_needed(layer: AdaptedLinear, parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and any(parameter is needed for needed in needing(layer))
