"""A model written to files with every adapted layer's W' in its place, as if it had never been adapted."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_model
from torch import Tensor, nn

from adapterzoo.errors import AdapterError, ExportError, where
from adapterzoo.interop.plain import (
    dequantised,
    forget_quantisation,
    linear,
    plain_layer,
    quantised_layers,
    stand_in,
    unreadable,
)
from adapterzoo.interop.staged import refuse_beside, refuse_problems, staged, whole_layers
from adapterzoo.layer import AdaptedLinear
from adapterzoo.merging import MergeReport
from adapterzoo.sharded import inside

_ADAPTERS = ("adapter_config.json", "adapterzoo.json")


def merge_and_save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str | None = None,
    dequantize: bool = False,
) -> MergeReport:
    """Write a model's weights with W' in the place of every adapted one, in the layout of the model without adapters.

    A model that has a `save_pretrained` (Transformers, diffusers) is written by it: config, weights or shards with
    their index, tied weights once; `Class.from_pretrained(directory)` reads it, without this library. Any other model
    is written as `model.safetensors` with the names of its plain state dict, which
    `safetensors.torch.load_model(plain_model, file)` reads.

    The model is left as it is, with its adapters, and may be merged or not. W' is formed in at least float32, rounded
    once to the weight's dtype, and waits on the disk until all is written: memory holds that of one layer at a time,
    the disk the adapted weights twice for a while. Files are written beside the directory and moved into it when all
    are complete. Other files there stay, but weights in another number of shards.

    Args:
        model: a model with adapted layers.
        directory: it is made if it is not there.
        max_shard_size: such as "5GB", for models with a `save_pretrained`; that one's default if None.
        dequantize: write ordinary weights for all quantised layers of the model, which can't hold W'.

    Returns:
        The share of each layer's update that was lost to rounding; `print(report)` shows it. A layer that was merged
        with keep_base=False is not in it: what its update was can't be told any more.

    Raises:
        TargetError: no adapted layer.
        ExportError: layers whose W' is not finite, that are quantised (without `dequantize`), or hold no values; a
            model in shards over several processes; a directory that holds an adapter, which would be applied on top.
            All are listed, and no file was changed.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from safetensors.torch import load_file
        >>> from adapterzoo import LoRA, adapt, merge_and_save
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> _ = adapt(model, LoRA(r=2))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     print(merge_and_save(model, directory))
        ...     sorted(load_file(directory + "/model.safetensors"))
        1 layer merged, nothing lost to rounding
        ['0.bias', '0.weight']
    """
    model = inside(model)
    layers, writes_itself = whole_layers(model), hasattr(model, "save_pretrained")
    if max_shard_size is not None and not writes_itself:
        raise ExportError(
            f"max_shard_size={max_shard_size!r} is for models with a save_pretrained; this {type(model).__name__} has "
            "none and is written as one file"
        )
    refuse_beside(directory, _ADAPTERS, "an adapter there would be applied once more on top of the merged weights")
    last = "config.json" if writes_itself else "model.safetensors"
    with _telling(directory), staged(directory, last=last) as stage:
        lost, plain = _plain_layers(layers, stage.scratch, dequantize)
        if dequantize:
            plain.update(_dequantised_layers(model, stage.scratch))
        whole = stand_in(model, plain)
        if dequantize:
            forget_quantisation(whole)
        if writes_itself:
            options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
            cast(Any, whole).save_pretrained(str(stage.files), **options)
        else:
            save_model(whole, str(stage.files / "model.safetensors"), metadata={"format": "pt"})
        _check_written(model, layers, stage.files)
    return MergeReport(lost)


@contextmanager
def _telling(directory: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(f"{os.fspath(directory)!r} can't be written, and no file was changed: {error}") from error


def _plain_layers(
    layers: dict[str, AdaptedLinear], scratch: Path, dequantize: bool
) -> tuple[dict[str, float], dict[nn.Module, nn.Module]]:
    """What each layer's rounding takes of its update, and a plain layer for each, with W' in it."""
    lost: dict[str, float] = {}
    plain: dict[nn.Module, nn.Module] = {}
    problems: list[str] = []
    for number, (name, layer) in enumerate(layers.items()):
        try:
            weight, share = _merged(layer, dequantize)
        except AdapterError as error:
            problems.append(str(error))
            continue
        if share is not None:
            lost[name] = share
        plain[layer] = plain_layer(layer, _on_disk(weight, scratch / str(number)))
    refuse_problems(problems, "the merged model can't be written, and no file was changed")
    return lost, plain


@torch.no_grad()
def _dequantised_layers(model: nn.Module, scratch: Path) -> dict[nn.Module, nn.Module]:
    """An ordinary layer for every quantised one that has no adapter."""
    layers = quantised_layers(model)
    problems = [f"{name}: {problem}" for name, layer in layers.items() if (problem := unreadable(layer)) is not None]
    refuse_problems(problems, "these layers can't be dequantised, and no file was changed")
    return {
        layer: linear(_on_disk(dequantised(layer), scratch / f"quantised{number}"), layer._parameters.get("bias"))
        for number, layer in enumerate(layers.values())
    }


def _merged(layer: AdaptedLinear, dequantize: bool) -> tuple[Tensor, float | None]:
    """W' as it is to be stored, and the share of the update that its rounding takes; None if that is unknown."""
    if not layer.merged:
        merge = layer.prepare_merge(keep_base=False, dequantize=dequantize)
        return merge.weight, merge.lost
    if not (layer.form.is_dense or dequantize):
        raise ExportError(f"{where(layer.name)} was quantised before it was merged; dequantize=True writes it as it is")
    return layer.weight.detach(), None if layer.unmerged_weight is None else _share_lost(layer)


@torch.no_grad()
def _share_lost(layer: AdaptedLinear) -> float:
    exact = layer.factored_weight()
    size = float(exact.update_norm())
    stored = layer.form.stored(exact.dense())
    if stored.dtype == layer.weight.dtype or not size:
        return 0.0
    return float((layer.weight - stored).norm()) / size


# Note [Merged weights wait on the disk]
# A save_pretrained wants all weights at once, and so does a file in safetensors. In memory that would be a second copy
# of every adapted weight. Pages of a mapped file are the system's to take back.
def _on_disk(value: Tensor, path: Path) -> Tensor:
    """The same values in a mapped file."""
    if not value.numel():
        return value.cpu()
    file = torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype)
    return file.view(value.shape).copy_(value)


def _check_written(model: nn.Module, layers: dict[str, AdaptedLinear], files: Path) -> None:
    """Raise unless the files hold at least as many numbers as the adapted weights: wrappers may write adapters only."""
    written = 0
    for path in files.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
        written += sum(torch.Size(shape).numel() for shape in shapes)
    needed = sum(layer.out_features * layer.in_features for layer in layers.values())
    if written < needed:
        raise ExportError(
            f"save_pretrained of {type(model).__name__} wrote {written:,} numbers in safetensors, and the adapted "
            f"layers alone have {needed:,}: it does not write the model; give the model that it wraps"
        )
