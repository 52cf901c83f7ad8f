"""What a load has done."""

from dataclasses import dataclass

from adapterzoo.checkpoint.wording import some
from adapterzoo.errors import count


@dataclass(frozen=True)
class LoadReport:
    """What `load` has done; `print` shows it.

    Args:
        name: the name of the adapter.
        layers: the adapted layers whose values were loaded.
        trained: parameters and buffers besides the adapters that were loaded.
        adapted: whether the model was adapted by this load, as the file says.
        thawed: of `trained`, the parameters that did not train before, and do now, as when they were saved.
        only_in_file: with strict=False, what the file has and the model has not: it was left out.
        only_in_model: with strict=False, what the model has and the file has not: it is as it was.
        notes: what is worth knowing and no error, such as a base that is quantised here and was not there.
    """

    name: str
    layers: tuple[str, ...]
    trained: tuple[str, ...] = ()
    adapted: bool = False
    thawed: tuple[str, ...] = ()
    only_in_file: tuple[str, ...] = ()
    only_in_model: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = "adapted and loaded" if self.adapted else "loaded"
        lines = [f"adapter {self.name!r}: {count(len(self.layers), 'layer')} {what}"]
        for title, names in (
            ("besides adapters", self.trained),
            ("made trainable", self.thawed),
            ("left out, only in the file", self.only_in_file),
            ("left as they are, only in the model", self.only_in_model),
        ):
            if names:
                lines.append(f"  {title}: {some(names)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])
