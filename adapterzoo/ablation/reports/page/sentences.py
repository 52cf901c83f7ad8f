"""The primary result in plain sentences, each with its limits."""

import math
from collections.abc import Mapping
from typing import Any

from adapterzoo.ablation.reports import texts
from adapterzoo.ablation.reports.pictures.material import Material
from adapterzoo.ablation.reports.statistics import too_small
from adapterzoo.errors import count

Row = Mapping[Any, Any]


def headline(material: Material) -> str:
    """What the primary family comes to, in one sentence.

    Args:
        material: of the report.
    """
    rows = primary_rows(material)
    tested = [row for row in rows if row["m"]]
    if not rows:
        return "The grid has no wrapper to compare with a bare generator."
    if not tested:
        return "The grid has no bare generator, so no wrapper can be compared."
    if not any(row["n"] for row in tested):
        return "No wrapper has a pair of finished runs yet, so there is nothing to compare."
    starred = [f"{row['wrapper']}{_judged(row)}" for row in tested if row["star"]]
    small = sum(bool(row["too_small"]) for row in tested)
    if small == len(tested):
        return f"n is too small for any of {count(len(tested), 'test')}: nothing can be called significant here."
    rest = f" For {small} of them n is too small." if small else ""
    verb = "differ" if len(starred) > 1 else "differs"
    who = f"{'; '.join(starred)} {verb}" if starred else "none differs"
    return f"Of {count(len(tested), 'wrapper')} tested together, {who} significantly from the bare generator.{rest}"


def sentences(material: Material) -> list[str]:
    """One for each wrapper, averaged over generators and panels.

    Args:
        material: of the report.
    """
    return [_sentence(row, material) for row in primary_rows(material)]


def primary_rows(material: Material) -> list[dict[Any, Any]]:
    """The rows of the primary family."""
    effects = material.effects
    found: list[dict[Any, Any]] = effects[effects["family"] == "primary"].to_dict("records")
    return found


def _sentence(row: Row, material: Material) -> str:
    if not row["m"]:
        return f"{row['wrapper']}: there is no bare generator to compare it with."
    if not row["n"]:
        return f"{row['wrapper']}: no pair of runs is done yet."
    return " ".join([_difference(row, material), _zero(row), _test(row)])


def _difference(row: Row, material: Material) -> str:
    percent = material.results.percent
    unit = " points" if percent else ""
    amount = f"{texts.amount(row['difference'], percent, signed=True)}{unit}"
    of = f", each the mean of {row['cells']} cells" if row["cells"] > 1 else ""
    pairs = f"n = {count(row['n'], 'pair')}{of}"
    if row["method"] == "equal":
        return f"{row['wrapper']}: all {row['n']} differences from the bare generator are equal, {amount} ({pairs})."
    bounds = texts.bounds(row["low"], row["high"], percent, signed=True)
    interval = "" if bounds == texts.NONE else f", 95 % interval {bounds}"
    return f"{row['wrapper']}: {amount} against the bare generator{_judged(row)}{interval} ({pairs})."


def _judged(row: Row) -> str:
    return "" if row["better"] is None else " (better)" if row["better"] else " (worse)"


def _zero(row: Row) -> str:
    if row["method"] == "equal":
        return "They do not vary, so there is no interval."
    if not (math.isfinite(row["low"]) and math.isfinite(row["high"])):
        return "One pair has no interval."
    if row["low"] <= 0 <= row["high"]:
        return "The interval contains zero: these runs do not tell better from worse."
    return "The interval does not contain zero."


def _test(row: Row) -> str:
    small = too_small(row["m"], row["n"])
    if small:
        return f"{small}: no significance can be claimed, whatever the difference."
    p = texts.probability(row["p_adjusted"])
    said = f"p {'' if p.startswith('<') else '= '}{p} after Holm's correction for {count(row['m'], 'test')}"
    return f"{'Significant' if row['star'] else 'Not significant'}: {said}."
