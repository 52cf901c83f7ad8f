"""What trains besides adapters, as PEFT saves it: whole modules (modules_to_save) and biases (bias)."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from adapterzoo.interop.peft_names import bars, is_saved
from adapterzoo.layer import AdaptedLinear, adapted_layers
from adapterzoo.sharded import gathered
from adapterzoo.watch import trains

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass
class Trained:
    """What a file has to hold besides adapters.

    Args:
        modules: entries of modules_to_save.
        bias: PEFT's field of that name.
        tensors: by key, without the prefix.
        problems: what PEFT has no place for.
    """

    modules: list[str] = field(default_factory=list)
    bias: str = "none"
    tensors: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def trained_elsewhere(model: nn.Module) -> Trained:
    """Everything of a model that trains and is no adapter."""
    found = Trained()
    for name, layer in adapted_layers(model).items():
        _take_layer(found, name, layer)
    loose = list(_modules_and_loose(model, found))
    for name, value in loose:
        if name.rpartition(".")[2] != "bias":
            found.problems.append(
                f"{name} trains, and PEFT saves whole modules or biases: train the whole module "
                "(adapt(..., train=[...])), or freeze it"
            )
        found.bias = "all"
        found.tensors[name] = gathered(value.detach())
    _take_modules(model, found)
    return found


def _take_layer(found: Trained, name: str, layer: AdaptedLinear) -> None:
    """Of an adapted layer itself only the bias can train."""
    for own, value in layer._parameters.items():
        if value is None or not trains(value):
            continue
        if own != "bias":
            found.problems.append(f"{name}.{own}, the base weight of an adapter, trains, which PEFT doesn't save")
        found.bias = "lora_only"
        found.tensors[f"{name}.base_layer.{own}"] = gathered(value.detach())


def _modules_and_loose(model: nn.Module, found: Trained) -> Iterator[tuple[str, nn.Parameter]]:
    """Put the largest modules that train as a whole into `found`, and give the other parameters that train."""
    waiting = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        if isinstance(module, AdaptedLinear):
            continue
        if prefix and (_is_whole(module) or _keeps_running_statistics(module)):
            found.modules.append(prefix)
            continue
        dot = prefix and prefix + "."
        for name, value in module.named_parameters(recurse=False, remove_duplicate=False):
            if trains(value):
                yield dot + name, value
        waiting += [(dot + name, child) for name, child in module.named_children()]


def _is_whole(module: nn.Module) -> bool:
    """Whether every parameter in a module trains, and none is an adapter's."""
    parameters = [value for value in module.parameters() if value.is_floating_point()]
    plain = not any(isinstance(part, AdaptedLinear) for part in module.modules())
    return plain and bool(parameters) and all(map(trains, parameters)) and not isinstance(module, _CONTAINERS)


def _keeps_running_statistics(module: nn.Module) -> bool:
    """Batch norms: what they keep changes in training, also where nothing of them trains."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None


def _take_modules(model: nn.Module, found: Trained) -> None:
    """The state of every module that PEFT will take these entries for."""
    found.modules.sort()
    layers = adapted_layers(model)
    inside = tuple(f"{name}." for name in layers)
    adapted = [name for name in layers if bars(found.modules, name) or is_saved(found.modules, name)]
    if adapted:
        found.problems.append(
            f"PEFT matches modules_to_save by the ends of names: {', '.join(found.modules)} would also take "
            f"{', '.join(adapted)}, which has an adapter"
        )
    for name, module in model.named_modules(remove_duplicate=False):
        if found.modules and is_saved(found.modules, name) and not name.startswith(inside):
            state = module.state_dict()
            found.tensors.update({f"{name}.{key}": gathered(value) for key, value in state.items()})
