"""What runs logged over their steps: learning curves, magnitudes and ranks."""

from collections.abc import Iterator

import pandas as pd

from adapterzoo.ablation.reports.pictures.lines import Quantity, line_picture
from adapterzoo.ablation.reports.pictures.material import Material
from adapterzoo.ablation.reports.pictures.picture import Picture

_BAND = "mean of the seeds, band from the lowest to the highest"
_LAYERS = "mean of layers and seeds, band over seeds, thin: single layers"


def learning_curves(material: Material) -> Iterator[Picture]:
    """The metric on the validation part, and the loss, over steps: a picture a panel.

    Args:
        material: of the report.
    """
    results = material.results
    name = f"validation/{results.metric}"
    unit = " in %" if results.percent else ""
    found = [
        (name, Quantity("curves", "curves", f"{name} while training: {_BAND}", f"{name}{unit}")),
        ("loss", Quantity("loss", "curves", f"Training loss: {_BAND}", "loss")),
    ]
    for logged, quantity in found:
        points = material.curves[material.curves["name"] == logged]
        if logged == name and results.percent:
            points = points.assign(value=100 * points["value"])
        yield from _by_panel(material, points, quantity)


def trajectories(material: Material) -> Iterator[Picture]:
    """Magnitudes and ranks over steps: a picture for each of them and each panel.

    Magnitudes are told relative to what they were at first, layer by layer, so that layers of different size can be
    averaged; where one was zero at first, as they are.

    Args:
        material: of the report.
    """
    curves = material.curves
    parts = curves["name"].str.split("/", n=2, expand=True).reindex(columns=range(3))
    magnitudes = curves.assign(label=parts[1], layer=parts[2])[(parts[0] == "magnitude") & parts[2].notna()]
    for label, points in magnitudes.groupby("label", sort=False):
        shown, relative = _relative(points)
        unit = ", relative to its start" if relative else ""
        quantity = Quantity(f"magnitude_{label}", "trajectories", f"{label}{unit}: {_LAYERS}", f"{label}{unit}")
        yield from _by_panel(material, shown, quantity)
    rows = curves["name"].str.startswith("rank/")
    ranks = curves[rows].assign(layer=curves["name"][rows].str.removeprefix("rank/"))
    yield from _by_panel(material, ranks, Quantity("rank", "trajectories", f"Rank in use: {_LAYERS}", "rank"))


def _relative(points: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """Each run's values over its first one, and whether that could be."""
    ordered = points.sort_values("step", kind="stable")
    first = ordered.groupby(["run", "layer"])["value"].transform("first")
    if (first == 0).any() or first.isna().any():
        return points, False
    return ordered.assign(value=ordered["value"] / first), True


def _by_panel(material: Material, points: pd.DataFrame, quantity: Quantity) -> Iterator[Picture]:
    points = points.dropna(subset=["value"])
    for panel in material.drawn:
        picture = line_picture(material, panel, points, quantity)
        if picture is not None:
            yield picture
