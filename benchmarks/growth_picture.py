"""The picture of how a step grows: one row for each measure, one column for each size."""

from pathlib import Path
from typing import Any

from benchmarks.layers import CONTROL, PEFT_LORA
from benchmarks.specs import SIX_DEEP

Curves = dict[tuple[str, str], dict[str, dict[int, float]]]  # (measure, axis) -> name -> size -> value
DEPTH = "wrappers"
ONE_OUTPUT = "one output tensor"
TITLES = {"tokens": "tokens", "in_features": "in", "out_features": "out", "rank": "rank", DEPTH: "wrappers over LoRA"}
# Okabe and Ito's colours, with a dash and a mark of its own for each line: readable in grey and for colour-blind eyes.
STYLE = {
    PEFT_LORA: ("#000000", "-", "s"),
    CONTROL: ("#999999", ":", ""),
    "LoRA": ("#0072B2", "--", "o"),
    "DoRA(LoRA)": ("#E69F00", "-.", "^"),
    SIX_DEEP: ("#D55E00", "-", "X"),
    ONE_OUTPUT: ("#CC79A7", ":", ""),
    "LoRA under n wrappers": ("#009E73", "-", "D"),
}


def draw(curves: Curves, path: Path) -> None:
    """Logarithmic axes, but for the number of wrappers; the legend stands above all panels."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    measures, axes = (list(dict.fromkeys(key[i] for key in curves)) for i in (0, 1))
    measures.reverse()  # time first
    figure = plt.figure(figsize=(2.9 * len(axes), 2.6 * len(measures) + 0.6), layout="constrained")
    panels = figure.subplots(len(measures), len(axes), sharex="col", sharey="row", squeeze=False)
    lines: dict[str, Any] = {}
    for row, measure in enumerate(measures):
        for column, axis in enumerate(axes):
            panel = panels[row][column]
            for name, points in curves[measure, axis].items():
                colour, dash, mark = STYLE[name]
                if axis == DEPTH and len(points) == 1:  # a layer without wrappers: a level to compare with
                    line = panel.axhline(*points.values(), color=colour, linestyle=dash, linewidth=1.4)
                else:
                    line = panel.plot(*zip(*points.items(), strict=True), color=colour, linestyle=dash, marker=mark,
                                      markersize=5, linewidth=1.6)[0]  # fmt: skip
                if name not in lines or len(points) > 1:
                    lines.setdefault(name, line)
            panel.set_yscale("log")
            if axis != DEPTH:
                panel.set_xscale("log", base=2)
                ticks = sorted({value for points in curves[measure, axis].values() for value in points})
                panel.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45)
                panel.minorticks_off()
            else:
                panel.set_xticks(range(7))
            panel.grid(True, which="major", color="#dddddd", linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
            if row == len(measures) - 1:
                panel.set_xlabel(TITLES[axis])
        panels[row][0].set_ylabel(measure)
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=len(lines), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
