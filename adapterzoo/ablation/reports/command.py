"""`adapterzoo report`: what a folder of runs shows, in the terminal and as files."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from adapterzoo.ablation.reports.files import together, write_tables
from adapterzoo.ablation.reports.page.page import page
from adapterzoo.ablation.reports.pictures.every import pictures
from adapterzoo.ablation.reports.pictures.material import Material
from adapterzoo.ablation.reports.results import read
from adapterzoo.ablation.reports.tables import terminal
from adapterzoo.errors import CommandError, count, did_you_mean, listing

FORMATS = {
    "html": ".html", "csv": ".csv", "parquet": ".parquet", "latex": ".tex", "json": ".json", "png": ".png",
    "svg": ".svg",
}  # fmt: skip
"""Formats and the endings of their files."""
_DRAWN = {"html", "png", "svg"}
PAGE, PICTURES, REPORT = "report.html", "pictures", "report"


def run(options: argparse.Namespace) -> str:
    """Print the tables, write the files, and say where they are.

    Args:
        options: runs, out, format; see `adapterzoo.ablation.command`.

    Raises:
        CommandError: unknown formats, all of them at once.
        RunsError: a folder that can't be read or written to.
    """
    formats = _formats(options.format)
    material = Material(read(options.runs))
    terminal(material.results)
    out = options.out or options.runs / REPORT
    names = write_report(material, out, formats)
    wrote = f"wrote {count(len(names), 'file')} to {out}"
    return f"{wrote}; open {out / PAGE} in a browser" if "html" in formats else wrote


def write_report(material: Material, out: Path, formats: Iterable[str] = tuple(FORMATS)) -> list[Path]:
    """Write tables, pictures and the page, all or none; files of the same names are replaced.

    Args:
        material: of the report.
        out: a folder; made if it is not there.
        formats: of FORMATS.

    Returns:
        The files.

    Raises:
        RunsError: they can't be written. Nothing was changed.
    """
    wanted = set(formats)
    with together(out) as folder:
        if wanted - _DRAWN:
            _write_tables(material, folder, {FORMATS[name] for name in wanted})
        if wanted & _DRAWN:
            _write_drawn(material, folder, wanted)
        found = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [out / path for path in found]


def _write_tables(material: Material, folder: Path, endings: set[str]) -> None:
    write_tables(material.results, folder)
    for path in folder.iterdir():
        if path.suffix not in endings:
            path.unlink()


def _write_drawn(material: Material, folder: Path, formats: set[str]) -> None:
    """Each picture is drawn once, for the page and for its files."""
    drawn = []
    for picture in pictures(material):
        for name in sorted(formats & {"png", "svg"}):
            (folder / PICTURES).mkdir(exist_ok=True)
            picture.save(folder / PICTURES / f"{picture.name}{FORMATS[name]}")
        if "html" in formats:
            drawn.append((picture, picture.svg()))
    if "html" in formats:
        (folder / PAGE).write_text(page(material, drawn), encoding="utf-8")


def _formats(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    problems = [
        f"unknown format {name!r}; known: {', '.join(FORMATS)}{did_you_mean(name, FORMATS)}"
        for name in names
        if name not in FORMATS
    ]
    if not names:
        problems.append(f"--format names none; known: {', '.join(FORMATS)}")
    if len(problems) > 1:
        raise CommandError(f"these formats can't be written:{listing(problems)}")
    if problems:
        raise CommandError(problems[0])
    return names
