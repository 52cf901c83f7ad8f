"""What the tensors of a file are: numbers of adapters by module, trained parameters, and copies of base weights."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapterzoo.errors import did_you_mean
from adapterzoo.interop.peft_config import LoraFields
from adapterzoo.interop.peft_names import PREFIX, is_saved

_SLOT = re.compile(
    r"(?P<module>.+?)\.(?P<slot>lora_[AB](\.weight)?|lora_E|lora_embedding_[AB]|lora_magnitude_vector(\.weight)?)"
)


@dataclass
class Contents:
    """The tensors of a file, sorted.

    Args:
        adapters: by module, then by what follows its name in the key.
        trained: parameters and buffers of the model that have other values in the file, by their names in the model.
        problems: keys that are of no use, and what is missing.
    """

    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def sort_tensors(model: nn.Module, config: LoraFields, tensors: Mapping[str, Tensor]) -> Contents:
    """Sort the tensors of a file by what they are for a model without adapters."""
    found = Contents()
    others: dict[str, Tensor] = {}
    for key, value in tensors.items():
        match = _SLOT.fullmatch(key.removeprefix(PREFIX))
        if not key.startswith(PREFIX):
            found.problems.append(f"{key} does not begin with {PREFIX!r}, as PEFT's own files do")
        elif match is not None:
            slot = match["slot"].replace("vector.weight", "vector")
            found.adapters.setdefault(match["module"], {})[slot] = value
        else:
            others[key.removeprefix(PREFIX)] = value
    if not found.adapters and not found.problems:
        found.problems.append("the file has no adapter's tensors in it")
    _sort_others(model, config, others, found)
    return found


def _sort_others(model: nn.Module, config: LoraFields, others: Mapping[str, Tensor], found: Contents) -> None:
    own = model.state_dict(keep_vars=True)
    saved = [
        name
        for name, _ in model.named_modules(remove_duplicate=False)
        if config.modules_to_save and name and is_saved(config.modules_to_save, name)
    ]
    kept = {name for name in own if name.startswith(tuple(module + "." for module in saved))}
    in_order = sorted(others, key=own.__contains__)  # so that a value under its own name counts
    values = {name: others[key] for key in in_order if (name := _plain(key, own)) is not None}
    for name, value in values.items():
        problem = _misplaced(name, value, own)
        if problem is not None:
            found.problems.append(problem)
        elif name in kept or (config.bias != "none" and name.endswith("bias")):
            found.trained[name] = value
        elif not _is_same(value, own[name]):
            found.problems.append(
                f"{name}: the file has a copy of this base weight with other values than the model; put them into the "
                "model first, if they are meant"
            )
    found.problems += [f"{name} is missing, though modules_to_save names it" for name in sorted(kept - values.keys())]
    found.problems += _torn_ties(found.trained, own)


def _torn_ties(trained: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[str]:
    """PEFT trains a copy for each name of a saved module, so what is one parameter here may be several there."""
    sharers: dict[int, list[str]] = {}
    for name, value in own.items():
        sharers.setdefault(id(value), []).append(name)
    for names in sharers.values():
        there = [name for name in names if name in trained]
        if there and (there != names or any(not torch.equal(trained[there[0]], trained[name]) for name in there)):
            yield (
                f"{' = '.join(names)} is one parameter of the model, and the file has other values for {there[0]} than "
                "for the rest; untie them first (Transformers: tie_word_embeddings=False), as PEFT did"
            )


# With bias="all", PEFT writes the biases of a saved module three times: under its own name, as they stand in its
# wrapper, and as they were before training.
def _plain(key: str, own: Mapping[str, Tensor]) -> str | None:
    """The parameter's name in a model without adapters; None for a value that has no use."""
    if key in own:
        return key
    parts = [part for part in key.split(".") if part not in ("base_layer", "modules_to_save")]
    if "original_module" in parts and ".".join(part for part in parts if part != "original_module") in own:
        return None
    return ".".join(parts)


def _misplaced(name: str, value: Tensor, own: Mapping[str, Tensor]) -> str | None:
    if name not in own:
        return f"{name} is no parameter of the model and of no adapter's{did_you_mean(name, own)}"
    if own[name].shape != value.shape:
        return f"{name} is {list(value.shape)} in the file and {list(own[name].shape)} in the model"
    if own[name].is_meta:
        return f"{name} is on the meta device; give the model its weights first"
    return None


def _is_same(value: Tensor, own: Tensor) -> bool:
    return torch.equal(value.to(own.device, own.dtype), own)
