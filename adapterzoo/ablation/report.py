"""What the demo prints: a table of the cells, and what it can and cannot show."""

import math
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table

from adapterzoo.ablation.cells import BARE

CAVEATS = """\
What this can show: that every composition trains, what it costs, and differences that are large beside their \
intervals. What it can't: which method is best. It is one small task (200 training images of 5 digits), one \
pretrained base and one test set of 300 images, on which one image is 0.3 points and the sampling error of an \
accuracy of 90 % is ± 3.4. An interval holds nothing of that, nor of the choice of a learning rate: only what \
varies with the seed (training subset, order of batches, new head, first values), and the seeds' subsets \
overlap. Three seeds leave 2 degrees of freedom, so an interval is 2.5 standard deviations to each side, and \
itself a rough guess: a narrow one may be luck. A difference whose interval contains zero is none that this run \
can see; of 12 differences, one may well leave zero outside by chance. The learning rate is the best of 3 on one \
seed's validation set; where it is the smallest or largest tried, a better one may lie beyond. Frozen and Full \
choose from other rates than the rest, and the head has the adapter's rate. Full is a dense update of every \
linear layer: biases, norms and positions stay frozen. The cells of a generator differ in their trainable \
parameters, and the times are those of this machine under this load."""


def cell_table(summary: pd.DataFrame) -> Table:
    """The summary as a table; accuracies in per cent."""
    seeds = summary["seeds"].max()
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"Test accuracy in %: mean ± half-width of the 95 % t interval (n = {seeds} seeds)",
        caption="lr: best of 3 on validation; (min), (max): at an edge of the 3\n"
        "vs bare: difference in points, paired by seed, with a t interval of its own\n"
        "trained: adapter + head parameters; ms: median of a step",
        caption_justify="left",
    )
    for name in ("generator", "wrapper"):
        table.add_column(name, no_wrap=True)
    for name in ("lr", "accuracy", "vs bare", "trained", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for row in summary.to_dict("records"):
        if previous not in (None, row["generator"]) and row["wrapper"] == BARE:
            table.add_section()
        table.add_row(*_cells(row, seeds))
        previous = row["generator"]
    return table


def percent(mean: float, half: float, signed: bool = False) -> str:
    """Write a share and the half-width of its interval in per cent: 85.3 ± 2.1."""
    if math.isnan(mean):
        return ""
    width = "?" if math.isnan(half) else f"{100 * half:.1f}"
    return f"{100 * mean:{'+z' if signed else ''}.1f} ± {width}"


def _cells(row: dict[str, Any], seeds: int) -> list[str]:
    edge = f" ({row['lr_edge']})" if row["lr_edge"] else ""
    fewer = f" (n = {row['seeds']})" if row["seeds"] < seeds else ""
    accuracy = percent(row["test_accuracy"], row["test_accuracy_half_width"]) + fewer
    gain = percent(row["gain_over_bare"], row["gain_half_width"], signed=True)
    return [
        str(row["generator"]),
        str(row["wrapper"]),
        f"{row['lr']:g}{edge}",
        accuracy,
        gain,
        f"{row['adapter_parameters']:,} + {row['head_parameters']:,}",
        f"{row['ms_per_step']:.1f}",
    ]
