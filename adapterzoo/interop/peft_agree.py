"""Whether a model, a config and the tensors of a file speak of the same layers, ranks and shapes."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from adapterzoo.errors import SpecError, did_you_mean
from adapterzoo.forms import form_of
from adapterzoo.forms.form import DTYPES
from adapterzoo.interop.peft_config import LoraFields
from adapterzoo.interop.peft_keys import Contents
from adapterzoo.interop.peft_layouts import slots
from adapterzoo.pieces import Piece
from adapterzoo.support import unsupported
from adapterzoo.targets import modules_by_name


def agreed_specs(model: nn.Module, config: LoraFields, contents: Contents) -> tuple[dict[str, Piece], list[str]]:
    """What adapts each layer that the file has tensors of, and everything that does not agree."""
    modules = dict(model.named_modules())
    specs: dict[str, Piece] = {}
    problems = [
        f"{' = '.join(item.names)}: one layer with several names; PEFT adapts one of them alone"
        for item in modules_by_name(model)
        if len(item.names) > 1 and not contents.adapters.keys().isdisjoint(item.names)
    ]
    for name, tensors in contents.adapters.items():
        found = _problems_of_layer(modules, config, name, tensors)
        problems += [f"{name}: {problem}" for problem in found]
        if not found:
            specs[name] = config.spec(name)
    return specs, problems + _untouched(modules, config, contents)


def _problems_of_layer(
    modules: Mapping[str, nn.Module], config: LoraFields, name: str, tensors: Mapping[str, Tensor]
) -> list[str]:
    if name not in modules:
        return [f"the model has no such module{did_you_mean(name, modules)}"]
    module, form = modules[name], form_of(modules[name])
    reason = unsupported(module)
    if reason is not None or form is None:
        return [f"it is a {type(module).__name__} and can't be adapted: {reason}"]
    if config.targets(name) is False:
        return ["the file has tensors of it, but the config's target_modules does not mean it"]
    try:
        spec = config.spec(name)
    except SpecError as error:
        return [str(error)]
    wanted = slots(spec, form.kind, form(module).shape, config.rank_in_file(name))
    return list(_differences({slot.suffix: slot.shape for slot in wanted.values()}, tensors))


def _differences(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """How the tensors of a layer are others than its spec and its shape ask for."""
    for suffix, shape in wanted.items():
        if suffix not in tensors:
            yield f"{suffix} is missing"
        elif tuple(tensors[suffix].shape) != shape:
            yield f"{suffix} is {list(tensors[suffix].shape)} in the file; it should be {list(shape)}"
        elif tensors[suffix].dtype not in DTYPES:
            yield f"{suffix} is {tensors[suffix].dtype}; it should be one of {', '.join(map(str, DTYPES))}"
    for suffix in tensors.keys() - wanted.keys():
        yield f"{suffix} is not expected; expected are {', '.join(wanted)}"


def _untouched(modules: Mapping[str, nn.Module], config: LoraFields, contents: Contents) -> list[str]:
    """Layers that the config means and the file has nothing of."""
    return [
        f"{name}: the config's target_modules means it, but the file has no tensors of it"
        for name, module in modules.items()
        if name and name not in contents.adapters and form_of(module) is not None and config.targets(name)
    ]


def too_wide(name: str, value: Tensor, own: Tensor) -> str | None:
    """Say that a value of the file would be rounded on its way into the model; None if it would not."""
    if torch.promote_types(value.dtype, own.dtype) == own.dtype:
        return None
    return f"{name} is {value.dtype} in the file and {own.dtype} in the model, which would round it; cast one of them"
