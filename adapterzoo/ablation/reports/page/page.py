"""The page itself: what was run, what came of it, and how far that goes."""

from base64 import b64encode
from collections.abc import Collection, Iterable
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from adapterzoo.ablation.reports.page.about import facts, fields, warnings
from adapterzoo.ablation.reports.page.failures import failures
from adapterzoo.ablation.reports.page.listing import cells_table, effects_tables, runs_table
from adapterzoo.ablation.reports.page.sentences import headline, sentences
from adapterzoo.ablation.reports.pictures.every import pictures
from adapterzoo.ablation.reports.pictures.material import Material
from adapterzoo.ablation.reports.pictures.picture import Picture
from adapterzoo.ablation.reports.tables import HOW_TO_READ

_HERE = "adapterzoo.ablation.reports.page"
_DRAWN = {
    "heat": "Heat maps", "fronts": "Costs", "curves": "Learning", "trajectories": "Magnitudes and ranks",
    "tuning": "Search",
}  # fmt: skip
"""Sections that are there if they have a picture."""


def page(material: Material, drawn: Iterable[tuple[Picture, str]] | None = None) -> str:
    """The report as one page of HTML that loads nothing: styles, script and pictures stand in it.

    All text is escaped. A policy in the page forbids the browser to load anything, and to run any script but the
    page's own. The same runs give the same page.

    Args:
        material: of the report.
        drawn: its pictures with their svg elements, if they were made already.
    """
    every = fields(material.results.environments)
    style, script = _file("page.css"), _file("page.js")
    drawn = [(picture, picture.svg()) for picture in pictures(material)] if drawn is None else drawn
    sections, failed = _sections(drawn), failures(material)
    effects = {table.name: table for table in effects_tables(material)}
    return str(
        _template().render(
            name=material.results.grid.get("name") or material.results.folder.name,
            style=Markup(style),
            script=Markup(script),
            script_hash=b64encode(sha256(script.encode()).digest()).decode(),
            facts=facts(material, every),
            warnings=warnings(material, every),
            headline=headline(material),
            sentences=sentences(material),
            effects=effects,
            cells=cells_table(material),
            runs=runs_table(material),
            failures=failed,
            environment=every,
            records=len(material.results.environments),
            sections=sections,
            navigation=_navigation(sections, "effects-secondary" in effects, bool(failed)),
            how_to_read=HOW_TO_READ,
        )
    )


def _sections(drawn: Iterable[tuple[Picture, str]]) -> dict[str, list[dict[str, Any]]]:
    """Pictures by the section that they stand in."""
    found: dict[str, list[dict[str, Any]]] = {}
    for picture, svg in drawn:
        found.setdefault(picture.section, []).append({"picture": picture, "svg": Markup(svg)})
    return found


def _navigation(sections: Collection[str], single: bool, failed: bool) -> list[tuple[str, str]]:
    """Address and name of each section that is there."""
    drawn = [(place, name) for place, name in _DRAWN.items() if place in sections]
    compared = [("single", "Single cells")] if single else []
    ended = [("failed", "Failed")] if failed else []
    last = [("cells", "Cells"), ("runs", "Runs"), *ended, ("environment", "Environment")]
    return [("result", "Result"), *compared, *drawn, *last]


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("adapterzoo.ablation.reports", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


def _file(name: str) -> str:
    return (files(_HERE) / name).read_text(encoding="utf-8")
