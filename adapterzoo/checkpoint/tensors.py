"""Reading tensor files, each checked against the description before anything in it is used."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapterzoo.checkpoint.manifest import AdapterEntry, FileEntry, Manifest, TensorEntry
from adapterzoo.checkpoint.reading import adapter_in, manifest_in, no_plain_file
from adapterzoo.checkpoint.storage import hash_of
from adapterzoo.checkpoint.wording import short, telling

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool", "C64": "complex64",
}  # fmt: skip


class TensorFiles:
    """The tensor files of an adapter, open.

    Args:
        directory: where they are.
        adapter: its description.
        stack: what closes them.
    """

    def __init__(self, directory: Path, adapter: AdapterEntry, stack: ExitStack) -> None:
        self._directory, self._entries, self._stack = directory, adapter.stored(), stack
        self._shared = adapter.shared()
        self._open: dict[tuple[str, torch.device], Any] = {}
        self.problems = [problem for name, entry in adapter.files.items() for problem in self._check(name, entry)]
        """What is wrong with them, one sentence each."""

    def read(self, key: str, device: torch.device) -> Tensor:
        """One tensor, straight onto a device. On the CPU it is the file's own memory: not to be written to."""
        key = self._shared.get(key, key)
        with telling(f"the tensor {short(key)} can't be read"):
            value: Tensor = self._file(self._entries[key].file, device).get_tensor(key)
        return value

    def _file(self, name: str, device: torch.device) -> Any:
        if (name, device) not in self._open:
            opened = safe_open(self._directory / name, framework="pt", device=str(device))
            self._open[name, device] = self._stack.enter_context(opened)
        return self._open[name, device]

    def _check(self, name: str, entry: FileEntry) -> Iterator[str]:
        path, what = self._directory / name, f"the tensor file {name}"
        problem = no_plain_file(self._directory, name)
        if problem is not None:
            yield f"{what} {problem}"
            return
        try:
            size = path.stat().st_size
            if size != entry.bytes:
                yield f"{what} has {size:,} bytes, not {entry.bytes:,}: it is {_state(size, entry.bytes)}"
            elif hash_of(path) != entry.sha256:
                yield f"{what} has another sha256 than described: its bytes were changed"
            else:
                yield from self._check_header(name, what)
        except (OSError, SafetensorError) as error:
            yield f"{what} can't be read: {error}"

    def _check_header(self, name: str, what: str) -> Iterator[str]:
        file = self._file(name, torch.device("cpu"))
        there, wanted = set(file.keys()), {key for key, entry in self._entries.items() if entry.file == name}
        for key in sorted(wanted - there):
            yield f"{what} lacks the tensor {short(key)}"
        for key in sorted(there - wanted):
            yield f"{what} holds a tensor that is not described: {short(key)}"
        for key in sorted(there & wanted):
            piece = file.get_slice(key)
            yield from _differences(f"{what}: {short(key)}", self._entries[key], piece.get_shape(), piece.get_dtype())


@contextmanager
def opened(directory: Path, name: str) -> Iterator[tuple[Manifest, AdapterEntry, TensorFiles]]:
    """Open a directory: its description, the adapter of that name, and its tensor files, checked but not raised.

    Raises:
        CheckpointError: no description that can be read, or no adapter of that name.
    """
    with ExitStack() as stack:
        manifest = manifest_in(directory)
        files = TensorFiles(directory, adapter_in(manifest, name, directory), stack)
        if files.problems and (now := manifest_in(directory)) != manifest:  # it has been saved anew in between
            manifest, files = now, TensorFiles(directory, adapter_in(now, name, directory), stack)
        yield manifest, adapter_in(manifest, name, directory), files


def _differences(what: str, entry: TensorEntry, shape: list[int], dtype: str) -> Iterator[str]:
    if shape != entry.shape:
        yield f"{what} has the shape {shape}, described as {entry.shape}"
    if _DTYPES.get(dtype) != entry.dtype:
        yield f"{what} is {_DTYPES.get(dtype, dtype)}, described as {entry.dtype}"


def _state(size: int, described: int) -> str:
    return "truncated" if size < described else "another file"
