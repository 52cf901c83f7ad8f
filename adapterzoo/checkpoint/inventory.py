"""What a model holds, seen from a file: its adapted layers, its base's parameters, and what else trains."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from adapterzoo.errors import CheckpointError
from adapterzoo.forms import form_of
from adapterzoo.layer import AdaptedLinear, adapted_layers
from adapterzoo.sharded import inside, reshard, wrapper_of_processes
from adapterzoo.targets import modules_by_name

_RUNNING = nn.modules.batchnorm._NormBase  # batch and instance norms


@dataclass(frozen=True)
class Kept:
    """A parameter or buffer besides the adapters, and every name that it has."""

    names: tuple[str, ...]
    value: Tensor
    what: str
    owner: nn.Module

    def values(self) -> Tensor:
        """What a file holds of it: the base weight where W' stands in its place."""
        if isinstance(self.owner, AdaptedLinear) and self.value is self.owner._parameters.get("weight"):
            return self.owner.state_dict()["weight"]  # type: ignore[no-any-return]
        return self.value


class Inventory:
    """The parts of a model that a file knows.

    Args:
        model: a model; DistributedDataParallel and torch.compile around it are looked through.

    Raises:
        CheckpointError: FullyShardedDataParallel, which keeps weights flat; or a layer without a shape.
    """

    def __init__(self, model: nn.Module) -> None:
        check_is_model(model)
        if wrapper_of_processes(model) == "FullyShardedDataParallel":
            raise CheckpointError(
                "FullyShardedDataParallel keeps weights flat and in pieces, so they can't be saved or loaded here: "
                "use fully_shard (FSDP2)"
            )
        reshard(model)
        self.model = unwrapped(model)
        self.kind = type(self.model).__name__
        self.layers = adapted_layers(self.model)
        self.parameters = self._parameters()
        _check_shapes(self.parameters)
        self.buffers = self._buffers()

    def names_of(self, name: str) -> tuple[str, ...]:
        """Every name of an adapted layer, by its first."""
        return self._names.get(name, (name,))

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of every parameter of the base, by all its names, sorted."""
        shapes = {name: _shape(item) for item in self.parameters for name in item.names}
        return dict(sorted(shapes.items()))

    @property
    def trained(self) -> list[Kept]:
        """Parameters besides the adapters that train, the buffers of their modules, and running means and variances.

        The last change in training mode whether or not anything of their modules trains.
        """
        parameters = [item for item in self.parameters if item.value.requires_grad]
        owners = {id(item.owner) for item in parameters if not isinstance(item.owner, AdaptedLinear)}
        return parameters + [i for i in self.buffers if id(i.owner) in owners or isinstance(i.owner, _RUNNING)]

    def _parameters(self) -> list[Kept]:
        self._names = {item.name: item.names for item in modules_by_name(self.model)}
        adapters = {id(value) for layer in self.layers.values() for value in layer.adapter.parameters()}
        return [item for item in _kept(self.model, "parameter") if id(item.value) not in adapters]

    def _buffers(self) -> list[Kept]:
        adapters = {id(value) for layer in self.layers.values() for value in layer.adapter.buffers()}
        return [item for item in _kept(self.model, "buffer") if id(item.value) not in adapters]


def check_is_model(model: object) -> None:
    """Raise a CheckpointError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"a torch.nn.Module is saved, or loaded into, not {type(model).__name__}")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where wrappers of processes, devices or the compiler stand around it."""
    own = inside(model)
    return unwrapped(own.module) if isinstance(own, nn.parallel.DistributedDataParallel) else own


def digest_of(shapes: Mapping[str, list[int]]) -> str:
    """The sha256 of names and shapes, in the order of the names."""
    text = json.dumps(sorted(shapes.items()), separators=(",", ":"))
    return sha256(text.encode("utf-8")).hexdigest()


def _kept(model: nn.Module, what: str) -> list[Kept]:
    """Every parameter, or every buffer that a state_dict holds, once, with all its names and the module it is in."""
    found: dict[int, tuple[list[str], Tensor, nn.Module]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, value in _own(module, what).items():
            found.setdefault(id(value), ([], value, module))[0].append(f"{prefix}.{name}" if prefix else name)
    return [Kept(tuple(names), value, what, owner) for names, value, owner in found.values()]


def _own(module: nn.Module, what: str) -> dict[str, Tensor]:
    table: Mapping[str, Tensor | None] = module._parameters if what == "parameter" else module._buffers
    fleeting = module._non_persistent_buffers_set
    return {name: value for name, value in table.items() if value is not None and name not in fleeting}


def _shape(item: Kept) -> list[int]:
    """Its shape; of a quantised weight the one that it stands for, so that the base may be quantised or not."""
    plain = type(item.value) is nn.Parameter and item.value.is_floating_point()
    if plain or item.value is not item.owner._parameters.get("weight"):
        return list(item.value.shape)
    if isinstance(item.owner, AdaptedLinear):
        return list(item.value.shape if item.owner.form.is_dense else item.owner.shape[:2])
    form = form_of(item.owner)
    return list(item.value.shape if form is None or form.is_dense else form(item.owner).shape[:2])


def _check_shapes(parameters: list[Kept]) -> None:
    blank = [name for item in parameters for name in item.names if isinstance(item.value, UninitializedParameter)]
    if blank:
        raise CheckpointError("these parameters have no shape yet; run the model once first", blank)
