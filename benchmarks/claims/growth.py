"""Time, operations and memory of a step grow with every size as PEFT's LoRA's do, and hardly with the depth."""

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from adapterzoo.pieces import Piece
from benchmarks.counted import alive_bytes, flops
from benchmarks.growth_picture import DEPTH, ONE_OUTPUT, Curves, draw
from benchmarks.layers import CONTROL, PEFT_LORA, Bench
from benchmarks.machine import ROOT
from benchmarks.options import Options
from benchmarks.paired import compare
from benchmarks.result import Result
from benchmarks.specs import CHAIN, SIX_DEEP, deep, wrapped
from benchmarks.steps import constants, training_step

START = {"tokens": 512, "in_features": 1024, "out_features": 1024, "rank": 16}
SIZES = {
    "tokens": (64, 128, 256, 512, 1024, 2048, 4096),
    "in_features": (256, 512, 1024, 2048, 4096),
    "out_features": (256, 512, 1024, 2048, 4096),
    "rank": (4, 8, 16, 32, 64, 128),
}
TIME, OPERATIONS, ALIVE = "time of a step, ms", "operations of a step, GFLOP", "alive after forward, MiB"
PICTURE, QUICK_PICTURE = ROOT / "docs" / "images" / "speed_growth.png", ROOT / "runs" / "speed_growth.png"


def run(options: Options) -> Result:
    """One size varies at a time, from one starting shape; then the depth."""
    pairs = 3 if options.quick else 11
    result = Result(
        "growth",
        "how time, operations and memory of a training step of one layer grow with one size, and with the depth",
        {**START, "pairs": pairs, "picture": str(_picture(options).relative_to(ROOT))},
    )
    curves: Curves = defaultdict(dict)
    for axis, values in SIZES.items():
        for value in values[:3:2] if options.quick else values:
            rank = value if axis == "rank" else START["rank"]
            specs = {"LoRA": deep(0, rank), "DoRA(LoRA)": wrapped(rank)["DoRA(LoRA)"], SIX_DEEP: deep(6, rank)}
            _measure(curves, axis, value, _bench(options, START | {axis: value}), specs, pairs)
    depths = {str(depth): deep(depth, START["rank"]) for depth in range(len(CHAIN) + 1)}
    _measure(curves, DEPTH, 0, _bench(options, START), depths, pairs)
    _put_depths_in_one_curve(curves)
    for (measure, axis), by_name in curves.items():
        for name, points in by_name.items():
            if name == ONE_OUTPUT:
                continue
            if axis != DEPTH:
                result.add(name, f"{measure}: exponent of {axis}", _exponent(points), note=_ends(points))
            elif len(points) > 1:
                result.add(name, f"{measure}: more per wrapper", _per_wrapper(points), note=_ends(points))
    draw(curves, _picture(options))
    return result


def _picture(options: Options) -> Path:
    return QUICK_PICTURE if options.quick else PICTURE


def _bench(options: Options, shape: Mapping[str, int]) -> Bench:
    return Bench(shape["in_features"], shape["out_features"], shape["tokens"], options, shape["rank"])


def _measure(curves: Curves, axis: str, value: int, bench: Bench, specs: Mapping[str, Piece], pairs: int) -> None:
    layers = {PEFT_LORA: bench.peft(), CONTROL: bench.peft(), **bench.all_of(specs)}
    for name, layer in layers.items():
        alive = alive_bytes(partial(layer.train(), bench.x), constants(layer, bench.x))
        curves[ALIVE, axis].setdefault(name, {})[value] = alive / 2**20
    curves[ALIVE, axis].setdefault(ONE_OUTPUT, {})[value] = bench.dy.nbytes / 2**20
    steps = {name: training_step(layer, bench.x, bench.dy) for name, layer in layers.items()}
    for name, step in steps.items():
        step()
        curves[OPERATIONS, axis].setdefault(name, {})[value] = flops(step) / 1e9
    found = compare(steps, PEFT_LORA, pairs, bench.options.seed, cuda=bench.options.cuda)
    for name, timing in found.timings.items():
        curves[TIME, axis].setdefault(name, {})[value] = 1000 * timing.seconds


def _put_depths_in_one_curve(curves: Curves) -> None:
    """The depths were candidates of one comparison, so that they are interleaved; as a curve they are one."""
    for (_, axis), by_name in curves.items():
        if axis == DEPTH:
            chain = {int(name): by_name.pop(name)[0] for name in list(by_name) if name.isdigit()}
            by_name["LoRA under n wrappers"] = dict(sorted(chain.items()))


def _exponent(points: dict[int, float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    slope = np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0]
    return round(float(slope), 4) + 0.0  # no negative zero


def _per_wrapper(points: dict[int, float]) -> float:
    return round((points[max(points)] - points[0]) / max(points), 4)


def _ends(points: dict[int, float]) -> str:
    return f"{points[min(points)]:.3g} at {min(points)}, {points[max(points)]:.3g} at {max(points)}"
