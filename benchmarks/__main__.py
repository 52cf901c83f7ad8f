"""Run benchmarks: `python -m benchmarks [claim ...] [--quick] [--out DIR] [--device cpu|cuda] [--threads N]`.

Each claim runs in a process of its own, prints its tables and writes `<claim>.json`. A miss is printed and is no
error; a claim that does not run is one.
"""

import argparse
import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console

from benchmarks.claims import CLAIMS
from benchmarks.counted_check import check
from benchmarks.machine import ROOT, describe
from benchmarks.options import Options

RESULTS, QUICK_RESULTS = Path(__file__).parent / "results", ROOT / "runs" / "bench_quick"


def run(claim: str, options: Options, out: Path, console: Console) -> None:
    """Run one claim in this process, show its tables and write its file."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    check()
    machine, start = describe(options), perf_counter()
    result = importlib.import_module(f"benchmarks.claims.{claim}").run(options)
    seconds = perf_counter() - start
    result.settings |= {"quick": options.quick, "device": options.device, "threads": options.threads}
    result.show(console)
    path = out / f"{claim}.json"
    result.write(path, machine, seconds)
    console.print(f"{seconds:.0f} s, {path}", style="dim", markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """One claim runs here; several run one after the other, each in a process of its own."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    asked = _parser().parse_args(given)
    unknown = [claim for claim in asked.claims if claim not in CLAIMS]
    if unknown:
        _parser().error(f"no claim is named {', '.join(unknown)}; there are {', '.join(CLAIMS)}")
    out = asked.out or (QUICK_RESULTS if asked.quick else RESULTS)
    options = Options(quick=asked.quick, device=asked.device, threads=asked.threads)
    claims = asked.claims or list(CLAIMS)
    if len(claims) == 1:
        run(claims[0], options, out, Console(width=None if sys.stdout.isatty() else 140))
        return 0
    flags = ["--out", str(out), "--device", asked.device, "--threads", str(asked.threads)]
    flags += ["--quick"] if asked.quick else []
    failed = [
        claim for claim in claims if subprocess.run([sys.executable, "-m", "benchmarks", claim, *flags]).returncode
    ]
    if failed:
        print(f"did not run to the end: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Benchmarks, one for each claim.")
    parser.add_argument("claims", nargs="*", metavar="claim", help=f"all of them if none is named: {', '.join(CLAIMS)}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller sizes: shows that all runs")
    parser.add_argument("--out", type=Path, help="where the JSON goes: benchmarks/results, or runs/bench_quick")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (2)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
