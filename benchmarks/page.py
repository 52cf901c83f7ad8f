"""Write the figures of benchmarks/results into docs/speed.md: `python -m benchmarks.page`.

A table stands between `<!-- figures: claim | measure -->` and `<!-- end -->`. A measure that ends in an asterisk stands
for all that begin so: then there is a row for each of them and a column for each name.
"""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT

PAGE, RESULTS = ROOT / "docs" / "speed.md", Path(__file__).parent / "results"
_PLACE = re.compile(r"(<!-- figures: (\w+) \| (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """The page with every table as the results have it."""
    return _PLACE.sub(lambda place: place[1] + _table(place[2], place[3]) + "\n" + place[4], page)


def _table(claim: str, measure: str) -> str:
    figures = json.loads((RESULTS / f"{claim}.json").read_text())["figures"]
    begin = measure.removesuffix("*")
    chosen = [f for f in figures if f["measure"] == measure or (begin != measure and f["measure"].startswith(begin))]
    assert chosen, f"{claim} has no measure {measure!r}; it has {sorted({f['measure'] for f in figures})}"
    if begin == measure:
        return _rows(["", measure, "95 % interval", "reach", ""], [_row(figure) for figure in chosen])
    names = list(dict.fromkeys(figure["name"] for figure in chosen))
    values = {(figure["measure"], figure["name"]): _number(figure["value"]) for figure in chosen}
    measures = list(dict.fromkeys(figure["measure"] for figure in chosen))
    shown = [measure.removeprefix(begin).partition(":")[0] for measure in measures]
    rows = [[text, *(values.get((m, name), "") for name in names)] for text, m in zip(shown, measures, strict=True)]
    return _rows([begin.strip(" ,"), *names], rows)


def _row(figure: dict[str, Any]) -> list[str]:
    interval = "" if figure["low"] is None else f"{_number(figure['low'])} to {_number(figure['high'])}"
    reach = "" if figure["reach"] is None else f"≤ {figure['reach']:g} {figure['verdict']}"
    return [figure["name"], _number(figure["value"]), interval, reach, figure["note"]]


def _rows(header: list[str], rows: list[list[str]]) -> str:
    used = [column for column in range(len(header)) if column == 0 or any(row[column] for row in rows)]
    lines = [[header[column] for column in used], ["---"] * len(used), *([row[c] for c in used] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if value < 10 else f"{value:.1f}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
