"""Every picture of a report, one after the other."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from adapterzoo.ablation.reports.pictures.curves import learning_curves, trajectories
from adapterzoo.ablation.reports.pictures.forest import forests
from adapterzoo.ablation.reports.pictures.fronts import front_pictures
from adapterzoo.ablation.reports.pictures.heat import heat_maps
from adapterzoo.ablation.reports.pictures.material import Material
from adapterzoo.ablation.reports.pictures.picture import Picture
from adapterzoo.ablation.reports.pictures.tuning import tuning_curves

_KINDS: tuple[Callable[[Material], Iterator[Picture]], ...] = (
    forests, heat_maps, front_pictures, learning_curves, trajectories, tuning_curves,
)  # fmt: skip


def pictures(material: Material) -> Iterator[Picture]:
    """Every picture that the runs give, no two of one name; made when it is asked for, so that few are in memory.

    Args:
        material: of the report.
    """
    names: dict[str, int] = {}
    for picture in (picture for kind in _KINDS for picture in kind(material)):
        number = names[picture.name] = names.get(picture.name, 0) + 1
        yield picture if number == 1 else replace(picture, name=f"{picture.name}_{number}")
