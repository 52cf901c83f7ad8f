"""The demo's pictures: a heatmap of the cells, and training curves."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from adapterzoo.ablation.cells import BARE, FROZEN, FULL, GENERATORS, WRAPPERS

# The colours of Okabe and Ito, told apart with every common colour blindness; line styles say it once more.
STYLES = {
    BARE: ("#000000", "-"),
    "MAP": ("#D55E00", "--"),
    "DoRA": ("#0072B2", "-."),
    "PreDiag": ("#009E73", ":"),
    "SORA(PreDiag)": ("#CC79A7", "-"),
}
REFERENCES = {FROZEN: ("#999999", "-"), FULL: ("#999999", "--")}


def heatmap(summary: pd.DataFrame, path: Path) -> None:
    """Mean test accuracy, wrappers by generators, with the two references beside; cells without runs stay empty."""
    figure = Figure(figsize=(8.6, 5.2), layout="constrained")
    grid, beside = figure.subplots(1, 2, width_ratios=(3, 1))
    shades = Normalize(100 * summary["test_accuracy"].min(), 100 * summary["test_accuracy"].max())
    cells = summary.set_index(["wrapper", "generator"])
    _draw_cells(grid, cells, [[(wrapper, name) for name in GENERATORS] for wrapper in WRAPPERS], shades)
    grid.set_xticks(range(len(GENERATORS)), list(GENERATORS.values()))
    grid.set_yticks(range(len(WRAPPERS)), ["bare (no wrapper)", *list(WRAPPERS)[1:]])
    _draw_cells(beside, cells, [[(BARE, FULL)], [(BARE, FROZEN)]], shades)
    beside.set_xticks([])
    beside.set_yticks((0, 1), ("Full\n(dense\nΔW)", "frozen,\nhead\nonly"))
    figure.colorbar(ScalarMappable(shades, "cividis"), ax=[grid, beside], label="test accuracy in %", shrink=0.8)
    seeds = summary["seeds"].max()
    figure.suptitle(f"Test accuracy in %: mean of n = {seeds} seeds ± half-width of the 95 % t interval")
    figure.savefig(path, dpi=150)


def curves(points: pd.DataFrame, path: Path) -> None:
    """Validation accuracy over steps, one panel a generator, mean of the seeds."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, len(GENERATORS), sharey=True)
    means = 100 * points.groupby(["generator", "wrapper", "step"])["val_accuracy"].mean()
    for panel, (generator, text) in zip(panels, GENERATORS.items(), strict=True):
        for reference, style in REFERENCES.items():
            _draw_curve(panel, means, (reference, BARE), reference, style)
        for wrapper, style in STYLES.items():
            _draw_curve(panel, means, (generator, wrapper), wrapper, style)
        panel.set(title=text, xlabel="step")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("validation accuracy in %")
    lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False)
    seeds = points["seed"].nunique()
    figure.suptitle(
        f"Validation accuracy while training: mean of n = {seeds} seeds, each cell at its chosen learning rate"
    )
    figure.savefig(path, dpi=150)


def _draw_cells(axes: Axes, cells: pd.DataFrame, keys: list[list[tuple[str, str]]], shades: Normalize) -> None:
    means = [[100 * cells["test_accuracy"].get(key, float("nan")) for key in row] for row in keys]
    axes.imshow(means, cmap="cividis", norm=shades, aspect="auto")
    for y, row in enumerate(keys):
        for x, key in enumerate(row):
            text = _cell_text(cells.loc[key], cells["seeds"].max()) if key in cells.index else "no runs"
            colour = "white" if shades(means[y][x]) < 0.5 else "black"
            axes.text(x, y, text, ha="center", va="center", color=colour)
    axes.tick_params(length=0)


def _cell_text(cell: pd.Series, seeds: int) -> str:
    fewer = f"\n(n = {cell['seeds']})" if cell["seeds"] < seeds else ""
    return f"{100 * cell['test_accuracy']:.1f}\n± {100 * cell['test_accuracy_half_width']:.1f}{fewer}"


def _draw_curve(axes: Axes, means: pd.Series, key: tuple[str, str], label: str, style: tuple[str, str]) -> None:
    if key in means.index.droplevel("step"):
        series, (colour, line) = means[key], style
        axes.plot(series.index, series.to_numpy(), line, color=colour, label=label, linewidth=1.8)
