"""Looking into a directory without a model: `inspect`."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from adapterzoo.checkpoint.manifest import AdapterEntry, Manifest
from adapterzoo.checkpoint.reading import manifest_in
from adapterzoo.checkpoint.specs import specs_of
from adapterzoo.checkpoint.wording import some
from adapterzoo.errors import count
from adapterzoo.pieces import Piece


@dataclass(frozen=True)
class Contents:
    """What a directory of adapters holds; `print` shows it.

    Args:
        directory: where it is.
        manifest: its description, all of it.
    """

    directory: Path
    manifest: Manifest

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return tuple(self.manifest.adapters)

    def specs(self, name: str = "default") -> dict[str, Piece]:
        """The spec of every adapted layer, by the layer's name."""
        adapter = self.manifest.adapters[name]
        specs = specs_of(adapter)
        return {layer.names[0]: specs[layer.composition] for layer in adapter.layers}

    def __str__(self) -> str:
        manifest = self.manifest
        base = f"base {manifest.base.class_name}, {count(len(manifest.base.parameters), 'parameter')}"
        lines = [
            f"version {manifest.format_version} of the format, written by adapterzoo {manifest.library_version}",
            f"{base}, digest {manifest.base.digest[:12]}",
        ]
        for name, adapter in manifest.adapters.items():
            lines += _adapter(name, adapter)
        return "\n".join(lines)


def inspect(directory: str | Path) -> Contents:
    """Read what a directory holds, without a model and without its tensors.

    Args:
        directory: where `save` wrote.

    Returns:
        The contents; `print` shows them, and `specs()` gives the composition of every layer.

    Raises:
        CheckpointError: there is no description of adapters, or it can't be read.

    Example:
        >>> import tempfile, torch
        >>> from adapterzoo import MAP, LoRA, adapt, inspect
        >>> from adapterzoo import save
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> plan = adapt(model, MAP(LoRA(r=2)))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     contents = save(model, directory)
        ...     inspect(directory).specs()
        {'0': MAP(LoRA(r=2)), '2': MAP(LoRA(r=2))}
    """
    path = Path(directory).expanduser()
    return Contents(path, manifest_in(path))


def _adapter(name: str, adapter: AdapterEntry) -> list[str]:
    numbers = sum(prod(entry.shape) for entry in adapter.stored().values())
    layers, files = count(len(adapter.layers), "layer"), count(len(adapter.files), "file")
    lines = [f"adapter {name!r}: {layers}, {count(numbers, 'number')} in {files}"]
    for i, spec in enumerate(specs_of(adapter)):
        members = [layer for layer in adapter.layers if layer.composition == i]
        if members:
            names = [layer.names[0] or "the model itself" for layer in members]
            lines.append(f"  {spec!r} on {some(names)}")
            lines += _ranks([rank for layer in members for rank in layer.ranks.values()])
    if adapter.trained:
        lines.append("  besides adapters: " + some([f"{e.names[0]} {e.shape}" for e in adapter.trained]))
    return lines


def _ranks(ranks: list[int]) -> list[str]:
    return [f"    ranks {min(ranks)} to {max(ranks)}, {sum(ranks)} in total, masked ones included"] if ranks else []
