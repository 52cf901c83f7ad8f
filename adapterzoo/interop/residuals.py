"""What a LoRA leaves of each layer's update: a report that prints as a table."""

from dataclasses import dataclass

from adapterzoo.errors import count


@dataclass(frozen=True)
class Truncated:
    """What became of one layer's update.

    Args:
        name: the layer.
        shape: (out, in) of its weight as a matrix.
        rank: of its LoRA.
        residual: ‖W' − W − B A‖_F / ‖W' − W‖_F, of the factors as they were written; 0 where there is no update.
        needed: the smallest rank that would keep the bound that was asked for; None without a bound.
        size: ‖W' − W‖_F.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    residual: float
    needed: int | None
    size: float

    @property
    def is_longer(self) -> bool:
        """Whether the two factors hold more numbers than the weight."""
        return self.rank * sum(self.shape) > self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class TruncationReport:
    """How well a LoRA stands for every layer's update; `print(report)` shows it.

    Args:
        layers: one by one.
    """

    layers: tuple[Truncated, ...]

    @property
    def worst(self) -> float:
        """The largest residual of all layers."""
        return max(layer.residual for layer in self.layers)

    @property
    def whole(self) -> float:
        """The residual of all updates taken together, as one long vector."""
        missed = sum((layer.residual * layer.size) ** 2 for layer in self.layers)
        size = sum(layer.size**2 for layer in self.layers)
        return float((missed / size) ** 0.5) if size else 0.0

    def __str__(self) -> str:
        rows = [("layer", "out x in", "rank", "residual")]
        rows += [(i.name, f"{i.shape[0]} x {i.shape[1]}", str(i.rank), f"{i.residual:.2e}") for i in self.layers]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        lines += ["", f"residual of the whole update {self.whole:.2e}, of the worst layer {self.worst:.2e}"]
        longer = sum(layer.is_longer for layer in self.layers)
        if longer:
            lines.append(
                f"{count(longer, 'layer')} with more numbers in the LoRA than in the weight: merge_and_save is smaller"
            )
        return "\n".join(lines)
