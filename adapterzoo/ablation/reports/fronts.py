"""Pareto fronts: which cells no other beats in both the metric and a cost."""

import pandas as pd

from adapterzoo.ablation.grids.axes import placeholders
from adapterzoo.ablation.reports.cells import cells
from adapterzoo.ablation.reports.results import Results
from adapterzoo.ablation.reports.statistics import front

COSTS = ("adapter_parameters", "ms_per_step", "memory_bytes")
_COLUMNS = (
    "problem", "cost", "cell", "generator", "wrapper", "reference", "panel", "cost_value", "mean", "low", "high",
    "front",
)  # fmt: skip


def fronts(results: Results) -> pd.DataFrame:
    """Which cells no other cell beats in both the metric and a cost.

    Means are compared, not intervals: of cells that seeds can't tell apart, one may be on the front by chance.

    Args:
        results: of a folder of runs.

    Returns:
        One row a cell, cost and problem. Columns: problem (those of the panel's axes that are options of the task, such
        as "dataset=mnli"; cells of different problems are never compared), cost ("adapter_parameters", "ms_per_step",
        "memory_bytes"), cell, generator, wrapper, reference, panel, cost_value, mean, low, high, front (bool).
    """
    table = cells(results)
    table["problem"] = _problems(results, table)
    parts = [_front(own, cost, results) for cost in COSTS for _, own in table.groupby("problem", sort=False)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(_COLUMNS))


def _front(table: pd.DataFrame, cost: str, results: Results) -> pd.DataFrame:
    flags = front(table["mean"], table[cost], results.maximise)
    return table.assign(cost=cost, cost_value=table[cost], front=flags)[list(_COLUMNS)]


def _problems(results: Results, table: pd.DataFrame) -> list[str]:
    """The values of the axes that no template holds: they change the task, not the composition."""
    templates = [text for axes in results.grid["grid"] for role in ("spec", "wrap") for text in axes[role].values()]
    inside = {name for text in templates for name in placeholders(text)}
    axes = [name for name in results.axes if name not in inside]
    return [
        ", ".join(f"{name}={row[f'axis/{name}']}" for name in axes if row[f"axis/{name}"] is not None)
        for row in table.to_dict("records")
    ]
