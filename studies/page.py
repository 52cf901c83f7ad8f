"""Write the tables of studies/results/ranks.json into docs/study_ranks.md: `python -m studies.page`.

A table stands between `<!-- table: name -->` and `<!-- end -->`.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import ROOT
from studies import pictures
from studies.arms import ADALOMAP, ADALORA, ARMS, DORA, LORA, PAIRS, PEFTS, PEFTS_MAP
from studies.summary import (
    Interval,
    by_kind,
    difference,
    edge,
    gain,
    half_width,
    hits,
    interval,
    moved,
    reported,
    same_arm,
    same_seed,
    shares,
    tuned,
)

PAGE, IMAGES = ROOT / "docs" / "study_ranks.md", ROOT / "docs" / "images"
RESULTS = Path(__file__).parent / "results" / "ranks.json"
_PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Result = Mapping[str, Any]
Rows = list[list[str]]


def filled(page: str, result: Result | None = None) -> str:
    """The page with every table as the result has it."""
    found = result or json.loads(RESULTS.read_text())
    return _PLACE.sub(lambda place: place[1] + table(TABLES[place[2]](found)) + "\n" + place[3], page)


def data(result: Result) -> Rows:
    """The sets."""
    about = result["data"]
    parts = [[name, *map(str, about[name].values())] for name in ("train", "validation", "test")]
    return [["", "pairs", "packages"], ["all", str(about["pairs"]), str(about["packages"])], *parts]


def arms(result: Result) -> Rows:
    """Every arm: accuracy and MRR on the test set, and what it trained."""
    zero = result["zero_shot"]["test"]
    rows = [["zero-shot", "", "", _percent(zero["accuracy"]), f"{zero['mrr']:.3f}", "", "0", "0", ""]]
    for name in _present(result):
        by_seed = reported(result, name)
        runs = list(by_seed.values())
        lr = f"{runs[0]['lr']:g}" + (f" ({edge(result, name)})" if edge(result, name) else "")
        found = _measures(interval(by_seed, "accuracy"), interval(by_seed, "mrr"))
        more = "{:+.1f} ± {:.1f}".format(*(100 * value for value in gain(result, name)))
        rows.append(
            [name, lr, str(len(runs)), *found, more, f"{runs[0]['parameters_in_training']:,}",
             _range(run["parameters"] for run in runs), f"{np.median([run['ms_per_step'] for run in runs]):.0f}"]
        )  # fmt: skip
    header = ["", "learning rate", "seeds", "accuracy in %", "MRR", "accuracy over zero-shot", "parameters in training",
              "at the end", "ms a step"]  # fmt: skip
    return [header, *rows]


def differences(result: Result) -> Rows:
    """Every pair: left less right."""
    rows = []
    for left, right in _pairs(result):
        found = difference(result, left, right)
        accuracy, mrr = _measures(found.accuracy, found.mrr, sign="+")
        errors = f"± {100 * found.accuracy_sampling:.1f}", f"± {found.mrr_sampling:.3f}"
        rows.append([f"{left} − {right}", str(found.seeds), accuracy, errors[0], mrr, errors[1]])
    return [["", "seeds", "accuracy, points", "its sampling error", "MRR", "its sampling error"], *rows]


def rates(result: Result) -> Rows:
    """Validation MRR of every learning rate."""
    tried = {arm.name: tuned(result, arm.name) for arm in ARMS}
    columns = sorted({rate for found in tried.values() for rate in found})
    rows = [[name, *(_cell(found, rate) for rate in columns)] for name, found in tried.items() if found]
    return [["", *(f"{rate:g}" for rate in columns)], *rows]


def kinds(result: Result) -> Rows:
    """Mean final rank of every kind of layer, over blocks and seeds."""
    found = {name: by_kind(result, name) for name in (ADALORA, ADALOMAP, DORA) if reported(result, name)}
    names = list(found[ADALORA])
    rows = [[name, *(f"{ranks[kind].mean():.1f}" for kind in names)] for name, ranks in found.items()]
    return [["", *names], *rows]


def penalty(result: Result) -> Rows:
    """The penalty's share of the importance: before the budget falls, and while it does."""
    spans = {"step 1": slice(0, 1), "step 10": slice(9, 10), "steps 11 to 50": slice(10, 50)}
    rows = []
    for name in (ADALORA, PEFTS, ADALOMAP, PEFTS_MAP):
        if reported(result, name):
            means = [100 * np.array(shares(result, name, span)) for span in spans.values()]
            rows.append([name, *(f"{part.mean():.1f} ({part.min():.1f} to {part.max():.1f})" for part in means)])
    return [["share in %: mean (range over seeds)", *spans], *rows]


def agreements(result: Result) -> Rows:
    """Spearman's correlation of final ranks: other penalty, other wrapper, other seed."""
    rows = []
    for left, right in ((PEFTS, ADALORA), (PEFTS_MAP, ADALOMAP), (ADALOMAP, ADALORA), (DORA, ADALORA)):
        if reported(result, left) and reported(result, right):
            changed = f"{moved(result, left, right):.1f}"
            rows.append([f"{left} and {right}, same seed", *_spread(same_seed(result, left, right)), changed])
    rows += [[f"{name}, two seeds", *_spread(same_arm(result, name)), ""] for name in (ADALORA, ADALOMAP)]
    return [["", "pairs", "mean", "range", "layers of 36 with another rank"], *rows]


def sampling(result: Result) -> Rows:
    """How far the test set alone may have moved one accuracy."""
    run = next(iter(reported(result, LORA).values()))
    row = [_percent(run["accuracy"]), str(len(run["places"])), f"{100 * half_width(hits(run)):.1f} points"]
    return [["one accuracy", "docstrings", "± 1.96 standard errors"], row]


def about(result: Result) -> Rows:
    """What it ran on, and how long."""
    machine, runs = result["machine"], result["runs"]
    minutes = [f"{seconds / 60:.0f}" for seconds in (result["seconds"], sum(run["run_seconds"] for run in runs))]
    entries = {
        "command": f"`{result['command']}`",
        "commit": str(machine["commit"])[:12] + (" and changes" if machine["changed_since_commit"] else ""),
        "processor": f"{machine['cpu']}, {machine['cores']} cores; {machine['processes']} processes of one thread",
        "versions": ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version),
        "Python": str(machine["python"]),
        "runs": f"{len(runs)}; {minutes[0]} minutes by the clock, {minutes[1]} of both processes together",
        "largest change of an embedding's number by compaction": f"{_largest_change(result):.1e}",
    }
    earlier = result["runs_of_earlier_starts"]
    if earlier:  # then commit, versions and minutes by the clock are those of the last start alone
        entries["of these from earlier starts"] = f"{earlier} runs; the commit and the minutes are the last start's"
    return [["", ""], *([name, text] for name, text in entries.items())]


TABLES: dict[str, Callable[[Result], Rows]] = {
    "data": data, "arms": arms, "differences": differences, "rates": rates, "kinds": kinds, "penalty": penalty,
    "agreements": agreements, "sampling": sampling, "about": about,
}  # fmt: skip


def table(rows: Rows) -> str:
    """Rows as Markdown, the first one as the header."""
    header, *rest = rows
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rest))


def _present(result: Result) -> list[str]:
    return [arm.name for arm in ARMS if reported(result, arm.name)]


def _pairs(result: Result) -> list[tuple[str, str]]:
    return [pair for pair in PAIRS if all(reported(result, name) for name in pair)]


def _measures(accuracy: Interval, mrr: Interval, sign: str = "") -> tuple[str, str]:
    return (
        f"{100 * accuracy[0]:{sign}.1f} ± {100 * accuracy[1]:.1f}",
        f"{mrr[0]:{sign}.3f} ± {mrr[1]:.3f}",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _range(values: Iterable[int]) -> str:
    found = sorted(values)
    low, high = found[0], found[-1]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _cell(found: Mapping[float, float], rate: float) -> str:
    if rate not in found:
        return ""
    return f"**{found[rate]:.3f}**" if found[rate] == max(found.values()) else f"{found[rate]:.3f}"


def _spread(values: Sequence[float]) -> tuple[str, str, str]:
    return str(len(values)), f"{np.mean(values):.2f}", f"{min(values):.2f} to {max(values):.2f}"


def _largest_change(result: Result) -> float:
    return max(run["change_by_compaction"] or 0.0 for run in result["runs"])


if __name__ == "__main__":
    pictures.draw_all(json.loads(RESULTS.read_text()), IMAGES)
    PAGE.write_text(filled(PAGE.read_text()))
