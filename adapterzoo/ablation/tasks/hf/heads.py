"""New heads: which modules they are, and what they start from."""

import torch
from transformers import PreTrainedModel

from adapterzoo.streams import stream


def head_names(model: PreTrainedModel) -> tuple[str, ...]:
    """What a classifier has beside its pretrained body, as its architecture calls it: `classifier`, `score`, ..."""
    return tuple(
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    )


def redraw(model: PreTrainedModel, names: tuple[str, ...], seed: int) -> None:
    """Give heads storage and values of their own: as the architecture draws them, from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream("hf head", seed).initial_seed())
        for module in (part for name in names for part in model.get_submodule(name).modules()):
            for parameter in module.parameters(recurse=False):
                parameter.data = torch.empty_like(parameter)
            model._init_weights(module)
