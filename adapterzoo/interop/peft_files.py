"""PEFT's two files in a directory: read whole or not at all, and written together."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterzoo.errors import PeftError
from adapterzoo.interop.staged import staged

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def write_pair(directory: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter into a directory, in the place of one that is there; other files are left alone.

    Args:
        directory: where to; it is made if it is not there.
        config: what goes into adapter_config.json.
        tensors: by key. Equal tensors may be one.

    Raises:
        ExportError: the directory is a file.
        PeftError: something that can't be written. What was there is still there.
    """
    if any(Path(directory).expanduser().glob("model*.safetensors")):
        raise PeftError(
            f"no adapter was written to {os.fspath(directory)!r}",
            [
                "it holds a model's weights, maybe merged ones, and from_pretrained would put the adapter on top of "
                "them; write to another directory"
            ],
        )
    try:
        with staged(directory, last=CONFIG) as stage:
            apart = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
            save_file(apart, stage.files / TENSORS, {"format": "pt"})
            (stage.files / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise PeftError(f"no adapter was written to {os.fspath(directory)!r}", [str(error)]) from error


def read_pair(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of an adapter.

    Raises:
        PeftError: files that are missing, damaged, or pickles, which run code when they are read.
    """
    place = Path(directory).expanduser()
    _check_there(place)
    try:
        config = json.loads((place / CONFIG).read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise PeftError(f"{CONFIG} in {str(place)!r} can't be read", [str(error)]) from error
    if not isinstance(config, dict):
        raise PeftError(f"{CONFIG} in {str(place)!r} can't be read", [f"it holds a {type(config).__name__}, no object"])
    try:
        return config, load_file(place / TENSORS)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise PeftError(f"{TENSORS} in {str(place)!r} can't be read", [str(error)]) from error


def _check_there(place: Path) -> None:
    missing = next((file for file in (CONFIG, TENSORS) if not (place / file).is_file()), None)
    if missing is None:
        return
    problem = f"there is no {missing}"
    if missing == TENSORS and (place / PICKLE).is_file():
        problem += (
            f", only {PICKLE}, a pickle, which may run any code when it is read. If you trust it, convert it: "
            f"safetensors.torch.save_file(torch.load('{PICKLE}', weights_only=True), '{TENSORS}', {{'format': 'pt'}})"
        )
    inside = sorted(path.parent.name for path in place.glob(f"*/{CONFIG}"))
    if missing == CONFIG and inside:
        problem += f"; there is one in {', '.join(inside)}: PEFT writes adapters with names there, so give that one"
    raise PeftError(f"{str(place)!r} holds no adapter of PEFT's", [problem])


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field stands in it twice")
    return fields
