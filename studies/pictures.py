"""The study's pictures: differences with their intervals, ranks over steps, ranks at the end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.arms import ADALOMAP, ADALORA, DORA, PAIRS
from studies.summary import by_kind, difference, kind_of, mean_trace, reported

Result = Mapping[str, Any]
ALLOCATED = (ADALORA, ADALOMAP, DORA)
LARGEST = 8
SHADES = "cividis"


def draw_all(result: Result, folder: Path) -> None:
    """All pictures of the page."""
    differences(result, folder / "study_differences.png")
    growth(result, folder / "study_ranks_over_steps.png")
    final_ranks(result, folder / "study_final_ranks.png")


def differences(result: Result, path: Path) -> None:
    """Paired differences of accuracy: the t interval over seeds, thick, and the test set's sampling error, thin."""
    found = [difference(result, *pair) for pair in PAIRS if all(reported(result, name) for name in pair)]
    figure = Figure(figsize=(8.4, 0.42 * len(found) + 1.6), layout="constrained")
    panel = figure.subplots()
    panel.axvline(0, color="#777777", linewidth=1)
    for row, item in enumerate(found):
        mean, half = (100 * value for value in item.accuracy)
        panel.errorbar(mean, row - 0.12, xerr=half, fmt="o", color="#0072B2", capsize=4, linewidth=2,
                       label="95 % t interval over seeds" if not row else None)  # fmt: skip
        panel.errorbar(mean, row + 0.16, xerr=100 * item.accuracy_sampling, fmt="none", color="#D55E00", capsize=3,
                       linewidth=1.2, label="± 1.96 standard errors over docstrings" if not row else None)  # fmt: skip
    names = [f"{item.left} − {item.right}  (n = {item.seeds})" for item in found]
    panel.set_yticks(range(len(found)), names)
    panel.invert_yaxis()
    panel.set_xlabel("difference of top-1 accuracy, points")
    panel.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)


def growth(result: Result, path: Path) -> None:
    """Ranks of every layer after every step, mean over seeds: one panel for each arm."""
    arms = [name for name in ALLOCATED if reported(result, name)]
    figure = Figure(figsize=(4.0 * len(arms) + 2.2, 8.2), layout="constrained")
    panels = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
    image = None
    for panel, name in zip(panels, arms, strict=True):
        runs = list(reported(result, name).values())
        ranks = mean_trace(runs).T
        image = panel.imshow(ranks, cmap=SHADES, vmin=0, vmax=LARGEST, aspect="auto", interpolation="none",
                             extent=(0.5, ranks.shape[1] + 0.5, len(ranks) - 0.5, -0.5))  # fmt: skip
        panel.set(title=f"{name}, mean of {len(runs)} seeds", xlabel="step")
        _blocks(panel, runs[0]["layers"])
    layers = next(iter(reported(result, arms[0]).values()))["layers"]
    panels[0].set_yticks(range(len(layers)), [_label(name) for name in layers], fontsize=8)
    figure.colorbar(image, ax=list(panels), label="rank", shrink=0.6)  # type: ignore[arg-type]
    figure.suptitle("Ranks that are not masked; lines part the encoder's blocks")
    figure.savefig(path, dpi=130)


def final_ranks(result: Result, path: Path) -> None:
    """Final ranks by kind of layer and by block, mean over seeds: one panel for each arm."""
    arms = [name for name in ALLOCATED if reported(result, name)]
    figure = Figure(figsize=(4.3 * len(arms) + 1.2, 3.8), layout="constrained")
    panels = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
    image = None
    for panel, name in zip(panels, arms, strict=True):
        found = by_kind(result, name)
        grid = np.array(list(found.values()))
        image = panel.imshow(grid, cmap=SHADES, vmin=0, vmax=LARGEST, aspect="auto")
        for (row, column), rank in np.ndenumerate(grid):
            colour = "white" if rank < LARGEST / 2 else "black"
            panel.text(column, row, f"{rank:.1f}", ha="center", va="center", color=colour, fontsize=10)
        panel.set(title=f"{name} (n = {len(reported(result, name))})", xlabel="block")
        panel.set_xticks(range(grid.shape[1]))
        panel.set_yticks(range(len(found)), list(found))
        panel.tick_params(length=0)
    figure.colorbar(image, ax=list(panels), label="rank", shrink=0.9)  # type: ignore[arg-type]
    figure.suptitle("Final rank of each layer, mean over seeds; 4 is the mean over layers")
    figure.savefig(path, dpi=130)


def _blocks(panel: Axes, layers: Sequence[str]) -> None:
    """A line wherever a new block begins."""
    numbers = [_block(name) for name in layers]
    for row in range(1, len(numbers)):
        if numbers[row] != numbers[row - 1]:
            panel.axhline(row - 0.5, color="white", linewidth=1.2)


def _label(layer: str) -> str:
    return f"{_block(layer)} {kind_of(layer)}"


def _block(layer: str) -> str:
    """The number of the block that a layer stands in: "encoder.layer.3.output.dense" is in "3"."""
    return layer.split(".")[2]
