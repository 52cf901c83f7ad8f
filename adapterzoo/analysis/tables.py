"""Plain text tables, CSV, and numbers of bytes as people read them."""

import csv
import io
from collections.abc import Sequence

Cell = str | int
"""What stands in a table: text, aligned to the left, or a whole number, aligned to the right."""


def aligned(rows: Sequence[Sequence[Cell]], left: int = 1) -> str:
    """Rows as text, the first `left` columns aligned to the left, the others to the right.

    Example:
        >>> print(aligned([("layers", "number"), ("q_proj", 4096)]))
        layers  number
        q_proj   4,096
    """
    cells = [[_shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def as_csv(rows: Sequence[Sequence[Cell]]) -> str:
    """Rows as CSV, numbers without separators."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().rstrip("\n")


def in_bytes(number: int) -> str:
    """A number of bytes in the largest unit that leaves at least one of it.

    Example:
        >>> in_bytes(1000), in_bytes(112_197_632)
        ('1,000 B', '107.00 MiB')
    """
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,} B"


def _shown(cell: Cell) -> str:
    return cell if isinstance(cell, str) else f"{cell:,}"
