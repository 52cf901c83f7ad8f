"""Run a study: `python -m studies ranks [--quick] [--workers N] [--runs DIR] [--out FILE]`.

Every run is kept in a file of its own as it ends, and runs that are there are not done again: an interrupted study goes
on where it was. At the end the result is written, with the machine, the versions and the commit, and with the page and
the pictures, unless `--quick` or `--out` leads elsewhere.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import ROOT
from studies import page, pictures, ranks

RESULTS = Path(__file__).parent / "results"
STUDIES = ("ranks",)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status is 1 if a run failed, 2 for bad arguments, 130 if interrupted."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    asked = _parser().parse_args(given)
    if asked.workers < 1:
        _parser().error(f"--workers {asked.workers}: at least one is needed")
    runs = asked.runs or ROOT / "runs" / ("study_ranks_quick" if asked.quick else "study_ranks")
    out = asked.out or (runs / "ranks.json" if asked.quick else RESULTS / "ranks.json")
    command = " ".join(["python -m studies", *given])
    try:
        result, failures = ranks.study(asked.quick, asked.workers, runs, command, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print(f"interrupted; finished runs are in {runs}, and the same command goes on from there")
        return 130
    ranks.save(result, out)
    if out == RESULTS / "ranks.json":
        pictures.draw_all(result, page.IMAGES)
        page.PAGE.write_text(page.filled(page.PAGE.read_text()))
    print(f"{len(result['runs'])} runs in {result['seconds'] / 60:.1f} min; {out}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m studies", description="Studies on a real task.")
    parser.add_argument("study", choices=STUDIES, help="which one")
    parser.add_argument("--quick", action="store_true", help="small sizes, a few runs: shows that all runs")
    parser.add_argument("--workers", type=int, default=2, help="worker processes, of one thread each (2)")
    parser.add_argument("--runs", type=Path, help="where finished runs are kept: runs/study_ranks")
    parser.add_argument("--out", type=Path, help="where the result goes: studies/results/ranks.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
