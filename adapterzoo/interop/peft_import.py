"""Adapters from PEFT's files."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from adapterzoo.errors import PeftError, TargetError
from adapterzoo.interop.peft_agree import agreed_specs, too_wide
from adapterzoo.interop.peft_config import read_config
from adapterzoo.interop.peft_files import read_pair
from adapterzoo.interop.peft_keys import Contents, sort_tensors
from adapterzoo.interop.peft_layouts import from_file, slots
from adapterzoo.interop.peft_wrap import start_from, wrapped
from adapterzoo.layer import AdaptedLinear, adapted_layers
from adapterzoo.pieces import Piece, layers_of
from adapterzoo.plan import Plan
from adapterzoo.sharded import inside, write
from adapterzoo.surgery import adapt, names_of_what_else_trains, unload
from adapterzoo.targets import Pattern

_WHAT = "this adapter can't be read into the model, and nothing was changed"
_FIRST_FACTORS = ("lora_A", "lora_A.weight", "lora_embedding_A")


def import_peft(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    wrap: str | Callable[[Piece], Piece] | None = None,
    seed: int = 0,
    adapter_dtype: torch.dtype | None = None,
    lean: bool = False,
) -> Plan:
    """Adapt a model as an adapter of Hugging Face's PEFT does, with its values, and freeze the rest.

    LoRA (rsLoRA and patterns of ranks too), DoRA and AdaLoRA can be read, as PEFT's save_pretrained writes them. Which
    layers are adapted is read off the tensors, and the config has to say the same. What the adapter's modules_to_save
    and bias have trained is written into the model's own parameters, which stay trainable. peft is not needed.

    With `wrap` training goes on under a wrapper, from the very function that was read: `wrap="MAP({spec})"`.

    Args:
        model: the base model, without adapters; it is changed in place.
        directory: where adapter_config.json and adapter_model.safetensors are.
        wrap: text with {spec} in the place of what was read, or a function of it: a spec around it.
        seed: see adapt; wrappers may draw initial values.
        adapter_dtype: see adapt.
        lean: see adapt.

    Returns:
        The plan, as adapt does.

    Raises:
        PeftError: files that can't be read, a field of the config that can't be honoured, a key that is missing, not
            expected or of another shape, other layers in the config than in the tensors, values that would be rounded,
            or a wrapper that can't start from what was read: everything of a kind at once.
        TargetError: the model has adapters, or a layer that can't be adapted (a tied one, say).
        SpecError: wrap makes no spec around what was read. In every case nothing was changed.

    Example:
        >>> import tempfile, torch
        >>> from adapterzoo import LoRA, adapt, unload, export_peft
        >>> from adapterzoo import import_peft
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> plan = adapt(model, LoRA(r=2, alpha=8))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     export_peft(model, directory)
        ...     plan = import_peft(unload(model, merge=False), directory, wrap="MAP({spec})")
        >>> plan.adapted[0].spec
        MAP(LoRA(r=2, alpha=8))
    """
    model = inside(model)
    if adapted_layers(model):
        raise TargetError("the model has adapters already, and a layer takes one: unload(model, merge=...) first")
    raw, tensors = read_pair(directory)
    config = read_config(raw)
    contents = sort_tensors(model, config, tensors)
    specs, problems = agreed_specs(model, config, contents)
    if contents.problems or problems:
        raise PeftError(_WHAT, contents.problems + problems)
    chosen = {name: wrapped(spec, wrap) for name, spec in specs.items()}
    return _adapt(model, contents, specs, chosen, seed=seed, adapter_dtype=adapter_dtype, lean=lean)


def _adapt(
    model: nn.Module,
    contents: Contents,
    specs: Mapping[str, Piece],
    chosen: Mapping[str, Piece],
    *,
    seed: int,
    adapter_dtype: torch.dtype | None,
    lean: bool,
) -> Plan:
    """All of it, or nothing."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    targets: dict[Pattern, Piece | None]
    targets = {re.compile(re.escape(name)): spec for name, spec in chosen.items()}
    train = [name for name in contents.trained if name in parameters and parameters[name].is_floating_point()]
    with _all_or_nothing(model):
        plan = adapt(model, targets=targets, train=train, seed=seed, adapter_dtype=adapter_dtype, lean=lean)
        plan = _thaw_exactly(plan, parameters, train)
        own = model.state_dict(keep_vars=True)
        problems = [too_wide(name, value, own[name]) for name, value in contents.trained.items()]
        for name, layer in adapted_layers(model).items():
            problems += _fill(layer, specs[name], contents.adapters[name])
        real = [problem for problem in problems if problem is not None]
        if real:
            raise PeftError(_WHAT, real)
    for name, value in contents.trained.items():
        write(own[name], value)
    return plan


def _thaw_exactly(plan: Plan, parameters: Mapping[str, nn.Parameter], train: list[str]) -> Plan:
    """Freeze what `adapt` has thawed too, because a name in `train` is the tail of its name."""
    meant = {id(parameters[name]) for name in train}
    for parameter in parameters.values():
        if parameter.requires_grad and id(parameter) not in meant:
            parameter.requires_grad_(False)
    trains = sum(p.numel() for p in plan.model.parameters() if p.requires_grad)
    return replace(plan, trained=names_of_what_else_trains(plan.model), trainable_parameters=trains)


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Take the adapters off again, and thaw what was frozen, if the body fails."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except BaseException:
        if adapted_layers(model):
            unload(model, merge=False)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        raise


def _fill(layer: AdaptedLinear, spec: Piece, tensors: Mapping[str, Tensor]) -> list[str | None]:
    """Put the values of a file into the innermost pieces of a layer, and let the wrappers around them start there."""
    inside = layer.adapter.parts()[-len(layers_of(spec)) :]
    rank = next(value.shape[0] for suffix, value in tensors.items() if suffix in _FIRST_FACTORS)
    places = slots(spec, layer.kind, layer.shape, rank)
    values = from_file(spec, {name: tensors[slot.suffix].reshape(slot.own) for name, slot in places.items()})
    present = {name: value for part in inside for name, value in part.values().items()}
    problems = [too_wide(f"{layer.name}.{name}", value, present[name]) for name, value in values.items()]
    if layer.weight.is_meta:
        problems.append(f"{layer.name} is on the meta device; give the model its weights first")
    if any(problems):
        return problems
    state = {"inner." * depth + name: values[name] for depth, part in enumerate(inside) for name in part.values()}
    inside[0].load_state_dict(state)
    return [start_from(layer, inside[0])]
