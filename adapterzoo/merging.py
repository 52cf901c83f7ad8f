"""What a merge did to the precision of an update."""

from collections.abc import Mapping
from dataclasses import dataclass

from adapterzoo.errors import count, listing


@dataclass(frozen=True)
class MergeReport:
    """How much of every layer's update was lost to rounding when W' was stored in the dtype of the weight.

        lost = ‖round(W') − W'‖_F / ‖W' − W‖_F

    In float32 and float64 it is 0: W' is formed in that very dtype. In 16 bits a small update can be lost as a whole:
    the spacing of bfloat16 numbers is 2⁻⁸ of their size.

    Args:
        lost: the share of each layer, by the layer's name.
    """

    lost: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest share of all layers."""
        return max(self.lost.values(), default=0.0)

    def __str__(self) -> str:
        head = f"{count(len(self.lost), 'layer')} merged"
        if not self.worst:
            return f"{head}, nothing lost to rounding"
        ranked = sorted(self.lost.items(), key=lambda item: -item[1])
        rows = [f"{name or 'this layer'}: {share:.2%}" for name, share in ranked if share]
        return f"{head}; share of the update lost to rounding to the weight's dtype, largest first:{listing(rows)}"
