"""Reading folders of runs, and the tables that are made of them."""

import csv
import json
import math
import os
import re
import shutil
import threading
from io import StringIO

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from adapterzoo.ablation.driving.session import plan
from adapterzoo.ablation.grids.outline import Outline
from adapterzoo.ablation.grids.planned import planned
from adapterzoo.ablation.reports import texts
from adapterzoo.ablation.reports.cells import cells
from adapterzoo.ablation.reports.effects import effects
from adapterzoo.ablation.reports.files import flat, together, typed, write_all
from adapterzoo.ablation.reports.fronts import fronts
from adapterzoo.ablation.reports.latex import cells_latex, effects_latex, escape
from adapterzoo.ablation.reports.results import read
from adapterzoo.ablation.reports.tables import terminal
from adapterzoo.ablation.runs.folder import grid_record, write_grid
from adapterzoo.ablation.runs.store import Store
from adapterzoo.ablation.tasks.records import Run
from adapterzoo.errors import RunsError
from adapterzoo.registry import parse
from tests import ablation_toys  # noqa: F401  (registers the task "toy")
from tests.ablation_runs import TRACEBACK, write_runs

FAILED, MISSING = [("MAP(LoRA(r=2))", 3)], [("DoRA(FLoRA(r=8))", 1)]
FILES = (
    "cells.csv", "cells.parquet", "cells.tex", "curves.parquet", "effects.csv", "effects.parquet", "effects.tex",
    "environments.csv", "fronts.csv", "fronts.parquet", "report.json", "runs.csv", "runs.parquet",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("runs"), failed=FAILED, missing=MISSING)


@pytest.fixture(scope="module")
def results(folder):
    return read(folder)


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    return write_all(results, tmp_path_factory.mktemp("report") / "deep" / "er")


def printed(results, width=200):
    stream = StringIO()
    terminal(results, Console(file=stream, width=width))
    return stream.getvalue()


def test_every_run_of_the_grid_is_a_row_whether_it_has_ended_or_not(results):
    runs = results.runs
    assert len(runs) == 26 * (3 + 8)
    assert runs["status"].value_counts().to_dict() == {"done": 284, "failed": 1, "missing": 1}
    missing = runs[runs["status"] == "missing"].iloc[0]
    assert (missing["cell"], missing["seed"], missing["role"]) == ("DoRA(FLoRA(r=8))", 1, "report")
    assert missing["run"]
    assert math.isnan(missing["test/accuracy"])


def test_the_rows_say_where_a_run_stands(results):
    run = results.runs[(results.runs["cell"] == "SORA(PreDiag(LoRA(r=8)))") & (results.runs["role"] == "report")].iloc[
        0
    ]
    assert (run["generator"], run["wrapper"], run["panel"]) == ("LoRA", "SORA(PreDiag)", "r=8")
    assert run["axis/r"] == 8
    assert not run["reference"]
    assert results.runs.loc[results.runs["reference"], "cell"].unique().tolist() == ["None", "Full()"]
    assert results.runs.loc[results.runs["cell"] == "None", "spec"].unique().tolist() == ["None"]
    assert (results.metric, results.maximise, results.percent, results.reference) == ("accuracy", True, True, "bare")
    assert results.tuned == ("lr",)
    assert results.axes == ("r",)
    assert set(results.metrics) >= {"test/accuracy", "validation/loss", "ms_per_step"}


def test_a_failed_run_has_its_error_in_a_line_and_its_traceback_whole(results):
    failed = results.runs[results.runs["status"] == "failed"].iloc[0]
    assert (failed["cell"], failed["seed"]) == FAILED[0]
    assert failed["error"] == "ValueError: the loss is <NaN> & more second line"
    assert results.tracebacks == {failed["run"]: TRACEBACK}


def test_runs_of_other_grids_are_counted_and_not_shown(results):
    assert results.others == 1
    assert "1 run of other grids in the folder, not shown" in printed(results)


def test_curves_are_one_row_a_value_and_running_ones_are_not_in_them(results):
    curves = results.curves
    assert set(curves["run"]) == set(results.runs.loc[results.runs["status"] != "missing", "run"])
    run = results.runs[(results.runs["cell"] == "MAP(AdaLoRA(r=2))") & (results.runs["role"] == "report")].iloc[0]
    own = curves[curves["run"] == run["run"]]
    assert own.loc[own["name"] == "loss", "step"].tolist() == [10, 20, 30, 40, 50]
    assert own.loc[own["name"] == "magnitude/alpha/blocks.0", "value"].iloc[-1] == pytest.approx(1.1)
    assert own.loc[own["name"] == "rank/blocks.0", "value"].tolist() == [4, 3, 3, 2, 2]


def test_environments_are_one_row_a_run_that_ended(results):
    table = results.environments
    assert len(table) == 285
    assert set(table["packages.torch"]) == {"2.13.0"}


def test_examples_are_a_table_and_none_are_an_empty_one(results):
    runs = results.runs
    table = results.examples(runs.loc[runs["role"] == "report", "run"].iloc[0])
    assert list(table) == ["id", "score", "label"]
    assert len(table) == 40
    assert results.examples(runs.loc[runs["role"] == "tune", "run"].iloc[0]).empty
    assert list(results.examples("nothing")) == ["id", "score"]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not really", b"\x93NUMPY"])
def test_damaged_examples_are_none(folder, results, tmp_path, damage):
    run = results.runs.loc[results.runs["role"] == "report", "run"].iloc[0]
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / run / "examples.npz").write_bytes(damage)
    assert read(tmp_path / "copy").examples(run).empty


def test_examples_with_words_for_scores_or_pickles_are_none(folder, results, tmp_path):
    runs = results.runs.loc[results.runs["role"] == "report", "run"].iloc[:2]
    for run, score in zip(runs, (np.array(["a", "b"]), np.array([{}, {}], dtype=object)), strict=True):
        (tmp_path / run).mkdir()
        np.savez(tmp_path / run / "examples.npz", id=np.arange(2), score=score)
    shutil.copy(folder / "grid.json", tmp_path)
    assert all(read(tmp_path).examples(run).empty for run in runs)


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"status": "perhaps"}', '{"status": "done"}', '{"status": "done", "metrics": {"loss": "x"}}',
     '{"status": "failed", "metrics": {}}', None],
)  # fmt: skip
def test_a_damaged_record_is_a_failed_run_that_says_so(tmp_path, damage):
    write_runs(tmp_path, generators=["LoRA"], references=[], others=0)
    run = read(tmp_path).runs["run"].iloc[-1]
    path = tmp_path / run / "result.json"
    path.unlink() if damage is None else path.write_text(damage)
    found = read(tmp_path)
    row = found.runs[found.runs["run"] == run].iloc[0]
    assert row["status"] == "failed"
    assert run in row["error"]
    assert run in found.problems[0]
    assert len(found.problems) == 1
    assert (found.runs["status"] == "done").sum() == len(found.runs) - 1
    assert f"damaged: {found.problems[0][:30]}" in printed(found)


def test_half_a_line_and_other_garbage_in_a_curve_is_left_out(tmp_path):
    write_runs(tmp_path, generators=["LoRA"], references=[], others=0)
    run = read(tmp_path).runs["run"].iloc[-1]
    lines = ['{"step": 1, "loss": 2.0, "why": "text", "nan": null}', "[3]", '{"loss": 3}', "\xff", '{"step": 2, "lo']
    (tmp_path / run / "metrics.jsonl").write_text("\n".join(lines), encoding="latin-1")
    found = read(tmp_path)
    own = found.curves[found.curves["run"] == run]
    assert own[["step", "name"]].to_numpy().tolist() == [[1, "loss"], [1, "nan"]]
    assert found.runs.loc[found.runs["run"] == run, "status"].item() == "done"


def test_a_search_that_has_not_ended_leaves_its_report_runs_missing_and_without_a_name(tmp_path):
    write_runs(tmp_path, generators=["LoRA"], references=[], axes={"r": [2]})
    runs = read(tmp_path).runs
    trial = runs[(runs["cell"] == "LoRA(r=2)") & (runs["role"] == "tune")].iloc[0]
    shutil.rmtree(tmp_path / trial["run"])
    found = read(tmp_path)
    report = found.runs[(found.runs["cell"] == "LoRA(r=2)") & (found.runs["role"] == "report")]
    assert report["seed"].tolist() == list(range(8))
    assert set(report["run"]) == {""}
    assert set(report["status"]) == {"missing"}
    assert report["option/lr"].isna().all()
    table = effects(found)
    assert (table["n"] == 0).all()
    assert (table["m"] == 3).all()
    assert set(found.curves["run"]) <= set(found.runs["run"])
    assert "0 of 8 pairs: seeds 0 1 2 3 4 5 6 7 (LoRA(r=2) has not run)" in table["note"].iloc[-1]


def test_a_grid_that_has_only_begun_can_be_reported(tmp_path):
    shutil.copy(write_runs(tmp_path / "all") / "grid.json", tmp_path)
    found = read(tmp_path)
    assert set(found.runs["status"]) == {"missing"}
    assert found.environments.empty
    assert found.curves.empty
    assert "0 done, 0 failed, 286 missing" in printed(found)
    write_all(found, tmp_path / "report")
    assert pd.read_parquet(tmp_path / "report" / "cells.parquet")["mean"].isna().all()


def test_a_grid_without_cells_is_an_empty_report(tmp_path):
    path = write_runs(tmp_path) / "grid.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cells": []}))
    found = read(tmp_path)
    assert found.others == 285 + 2
    assert "0 done, 0 failed, 0 missing" in printed(found)
    write_all(found, tmp_path / "report")
    assert pd.read_csv(tmp_path / "report" / "effects.csv").empty


def test_a_grid_without_a_search_is_read(tmp_path):
    found = read(write_runs(tmp_path, rates=[], axes={}))
    assert found.tuned == ()
    assert set(found.runs["role"]) == {"report"}
    assert set(found.runs["panel"]) == {""}
    assert set(cells(found)["edge"]) == {""}
    assert "options" not in printed(found)
    assert set(fronts(found)["problem"]) == {""}


def test_a_metric_that_bears_the_name_of_a_column_is_set_apart(tmp_path):
    write_runs(tmp_path, generators=["LoRA"])
    run = read(tmp_path).runs["run"].iloc[-1]
    path = tmp_path / run / "result.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "metrics": {**record["metrics"], "seconds": 7, "cell": 8}}))
    row = read(tmp_path).runs.set_index("run").loc[run]
    assert (row["seconds"], row["metric/seconds"], row["metric/cell"]) == (record["seconds"], 7, 8)


def test_a_real_grid_is_read_as_the_driver_wrote_it(tmp_path):
    axes = {"spec": ["LoRA(r={r})"], "wrap": ["{spec}", "MAP({spec})", "DoRA({spec})"], "r": [2, 3], "seed": [0, 1]}
    content = {
        "task": {"name": "toy", "fails": "MAP(LoRA(r=3"},
        "grid": axes,
        "references": ["None"],
        "tune": {"lr": [1e-4, 1e-3, 1e-2]},
    }
    do_all(Outline.of(content), tmp_path)
    found = read(tmp_path)
    report = found.runs[found.runs["role"] == "report"]
    assert len(found.runs) == 7 * (3 + 2)
    assert report["status"].value_counts().to_dict() == {"done": 12, "missing": 2}
    assert set(report.loc[report["status"] == "missing", "spec"]) == {"MAP(LoRA(r=3))"}
    assert (found.runs["status"] == "failed").sum() == 3
    assert "ValueError: MAP(LoRA(r=3)) was asked to fail" in set(found.runs["error"])
    assert (found.others, found.problems) == (0, ())
    assert set(report.loc[report["status"] == "done", "option/lr"]) == {1e-3}
    single = effects(found).query("family == 'secondary'").set_index(["wrapper", "panel"])
    assert single["n"].to_dict() == {("MAP", "r=2"): 2, ("MAP", "r=3"): 0, ("DoRA", "r=2"): 2, ("DoRA", "r=3"): 2}
    assert single["example_n"].to_dict() == dict.fromkeys(single.index, 0)  # the toy's scores are not its metric
    write_all(found, tmp_path / "report")


def do_all(outline, folder):
    """Do every run of a grid in this process, in the order in which they become known."""
    checked, store = plan(outline), Store(folder)
    write_grid(folder, grid_record(checked.outline, checked.records, checked.about))

    def metrics(run):
        return store.result(run)["metrics"] if store.status(run) == "done" else None

    while waiting := [
        one.run for one in planned(checked.records, metrics, store.status) if not store.status(one.run.id)
    ]:
        for spec in waiting:
            attempt = store.begin(spec)
            try:
                composition = None if spec.spec is None else parse(spec.spec)
                run = Run(composition, spec.seed, 6, torch.device("cpu"), spec.test, attempt.log)
                attempt.finish(spec.make_task().run(run), 0.1)
            except ValueError as error:
                attempt.fail(error, 0.1)


def test_no_folder_and_no_grid_are_sentences(tmp_path):
    write_runs(tmp_path / "digits", generators=["LoRA"])
    with pytest.raises(RunsError, match=r"there is no folder .*; did you mean 'digits'"):
        read(tmp_path / "digit")
    with pytest.raises(RunsError, match=r"no grid\.json"):
        read(tmp_path)
    with pytest.raises(RunsError, match="there is no folder"):
        read(tmp_path / "digits" / "grid.json")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "can't be read"),
        ("[]", "has format None; this version of adapterzoo reads format 1"),
        ('{"format": 2}', "has format 2"),
        ('{"format": 1, "cells": []}', "lacks grid, metric, maximise, percent, tuned"),
    ],
)
def test_a_grid_of_another_version_is_a_sentence(tmp_path, content, sentence):
    (tmp_path / "grid.json").write_text(content)
    with pytest.raises(RunsError, match=sentence):
        read(tmp_path)


def test_cells_of_another_version_are_a_sentence(tmp_path):
    path = write_runs(tmp_path) / "grid.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "cells": [{"cell": "LoRA", "colour": "red"}]}))
    with pytest.raises(RunsError, match=r"grid\.json is no record of a grid"):
        read(tmp_path)


def test_the_terminal_shows_every_cell_its_effect_and_what_failed(results):
    text = printed(results)
    assert "test/accuracy in %: mean [95 % interval over seeds]" in text
    assert "averaged over generators and panels" in text
    assert "cell by cell" in text
    for cell in cells(results).to_dict("records"):
        assert texts.mean_of(cell, percent=True) in text
    for effect in effects(results).to_dict("records"):
        assert texts.difference_of(effect, percent=True) in text
    assert "ValueError: the loss is <NaN> & more second line" in text
    assert "284 done, 1 failed, 1 missing" in text
    assert "7 of 8 pairs: seed 3 (MAP(LoRA(r=2)) failed)" in text
    assert "n too small: 10 needed" in text
    assert "lr 0.0001 (lowest)" in text


def test_a_pipe_gets_lines_that_are_wide_enough(results):
    lines = printed(results, width=40).splitlines()
    assert any("SORA(PreDiag)" in line and "n too small: 10 needed" in line for line in lines)


def test_names_with_brackets_are_shown_as_they_are(tmp_path):
    axes = {"dataset": ["[red]", "b"]}
    found = read(write_runs(tmp_path, axes=axes, options=["dataset"], seeds=2, generators=["LoRA"]))
    assert "dataset=[red]" in printed(found)


def test_numbers_are_written_as_a_reader_expects():
    assert texts.amount(0.85312, percent=True) == "85.3"
    assert texts.amount(12.3456, percent=False) == "12.35"
    assert texts.amount(-0.0, percent=False, signed=True) == "+0"
    assert texts.amount(math.nan, percent=True) == "-"
    assert texts.amount(-1e-9, percent=True, signed=True) == "+0.0"
    assert texts.estimate(0.5, math.nan, math.nan, percent=True) == "50.0"
    assert texts.estimate(-0.012, -0.03, 0.006, percent=True, signed=True) == "-1.2 [-3.0, +0.6]"
    assert [texts.probability(p) for p in (0.0005, 0.0312, 1.0, math.nan)] == ["<0.001", "0.031", "1.000", "-"]
    assert texts.difference_of({"method": "equal", "n": 8, "difference": 0.0}, percent=True) == "all 8 equal: +0.0"
    assert texts.mean_of({"method": "equal", "n": 3, "mean": 0.9}, percent=True) == "all 3 equal: 90.0"
    assert texts.quantity(12288.0) == "12,288"
    assert texts.verdict({"star": True, "m": 4, "too_small": False}) == "*"
    assert texts.verdict({"star": False, "m": 0, "too_small": True}) == "no bare cell"
    row = {"option/lr": 1e-3, "option/steps": 5, "option/kind": "a", "option/none": math.nan, "edge": "steps highest"}
    assert texts.options_of(row) == "lr 0.001, steps 5 (highest), kind a"


def test_all_files_are_written_and_nothing_else(written):
    assert tuple(path.name for path in written) == FILES
    assert {path.name for path in written[0].parent.iterdir()} == set(FILES)


def test_csv_and_parquet_hold_the_tables(results, written):
    folder = written[0].parent
    for name, table in (("effects", effects(results)), ("cells", cells(results)), ("fronts", fronts(results))):
        stored = pd.read_parquet(folder / f"{name}.parquet")
        assert list(stored) == list(table)
        numbers = [column for column in table if table[column].dtype == "float64"]
        pd.testing.assert_frame_equal(stored[numbers], table[numbers])
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["wrapper"] for row in rows] == table["wrapper"].tolist()
    assert rows[0]["cost"] == "adapter_parameters"
    stored = pd.read_parquet(folder / "effects.parquet")
    assert stored["seeds"].map(list).tolist() == effects(results)["seeds"].tolist()
    runs = pd.read_parquet(folder / "runs.parquet")
    assert runs["axis/r"].dropna().unique().tolist() == [2, 8]
    assert len(pd.read_parquet(folder / "curves.parquet")) == len(results.curves)


def test_lists_are_text_in_csv(results):
    assert flat(effects(results))["seeds"].iloc[-1] == "0 1 2 3 4 5 6 7"


def test_a_column_of_several_kinds_is_text_in_parquet(tmp_path):
    table = typed(pd.DataFrame({"axis/x": pd.Series([2, "two", None], dtype=object), "y": [1, 2, 3]}))
    table.to_parquet(tmp_path / "x.parquet")
    assert table["axis/x"].tolist()[:2] == ["2", "two"]
    assert table["axis/x"].isna().tolist() == [False, False, True]
    assert table["y"].tolist() == [1, 2, 3]


def test_json_holds_the_rows_and_no_nan(results, written):
    text = (written[0].parent / "report.json").read_text(encoding="utf-8")
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["format"] == 1
    assert content["metric"] == "test/accuracy"
    assert content["grid"] == results.grid
    assert len(content["effects"]) == len(effects(results))
    first = content["effects"][0]
    assert first["difference"] == effects(results)["difference"].iloc[0]
    assert first["seeds"] == [0, 1, 2, 4, 5, 6, 7]
    missing = next(run for run in content["runs"] if run["status"] == "missing")
    assert missing["test/accuracy"] is None


def lines_of(latex):
    return [line for line in latex.splitlines() if line.endswith(r"\\")]


def test_latex_is_booktabs_with_as_many_cells_in_every_row(results):
    latex = effects_latex(effects(results), results)
    tables = latex.split(r"\begin{table}")[1:]
    assert len(tables) == 2
    for table, rows in zip(tables, (3, 18), strict=True):
        body = table.split(r"\begin{tabular}")[1].split(r"\end{tabular}")[0]
        assert all(rule in body for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
        columns = re.match(r"\{([lr]+)\}", body).group(1)
        assert len(lines_of(body)) == rows + 1
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines_of(body)} == {len(columns) - 1}
    assert latex.count("{") == latex.count("}")
    assert "d\\_z" in latex
    assert "MAP & 7 &" in latex


def test_a_long_latex_table_breaks_over_pages(tmp_path):
    found = read(write_runs(tmp_path, axes={"r": [1, 2, 4, 8]}, seeds=2, rates=[], examples=0))
    assert r"\begin{longtable}" in cells_latex(cells(found), found)
    assert r"\begin{table}" in effects_latex(effects(found), found)


def test_nothing_in_a_name_acts_on_latex(tmp_path):
    nasty = r"50%_&$#{}~^\<x>|" + '"'
    assert re.sub(r"\\text[a-z]+\{\}|\\[%_&$#{}]", "", escape(nasty)) == "50x"
    found = read(write_runs(tmp_path, generators=["[LoRA_1]", "A&B"], axes={}, seeds=3))
    latex = cells_latex(cells(found), found)
    assert "{}[LoRA\\_1] & bare" in latex  # a bracket after a line break would be its argument
    assert r"A\&B" in latex


def test_a_report_can_be_written_again_and_other_files_stay(results, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "cells.csv").write_text("old")
    write_all(results, tmp_path)
    write_all(results, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "notes.txt"}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "cells.csv").read_text() != "old"


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failure_while_writing_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    before = snapshot(tmp_path)
    with pytest.raises(ZeroDivisionError), together(tmp_path) as folder:  # noqa: PT012
        (folder / "a").write_text("new")
        raise ZeroDivisionError
    assert snapshot(tmp_path) == before
    with pytest.raises(KeyboardInterrupt), together(tmp_path / "new" / "one"):
        raise KeyboardInterrupt
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("obstacle", range(3))
def test_a_file_that_cannot_take_its_place_changes_nothing(tmp_path, obstacle):
    names = ["a", "pictures/b", "c"]
    (tmp_path / "a").write_text("old")
    (tmp_path / names[obstacle]).unlink(missing_ok=True)
    (tmp_path / names[obstacle] / "full").mkdir(parents=True)  # a folder where a file should go
    before, folders = snapshot(tmp_path), sorted(tmp_path.rglob("*"))
    with pytest.raises(RunsError, match=r"can't be written to .*nothing was changed"):
        write_three(tmp_path, names)
    assert snapshot(tmp_path) == before
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "pictures") == [
        path for path in folders if path.name != "pictures"
    ]


def write_three(out, names):
    with together(out) as folder:
        (folder / "pictures").mkdir()
        for name in names:
            (folder / name).write_text("new")


def test_nested_files_take_their_places(tmp_path):
    with together(tmp_path / "out") as folder:
        (folder / "pictures").mkdir()
        (folder / "pictures" / "heat.svg").write_text("<svg/>")
    assert snapshot(tmp_path) == {"out/pictures/heat.svg": b"<svg/>"}


def test_a_full_disk_and_a_file_in_the_place_of_the_folder_are_sentences(tmp_path, results, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunsError, match=r"the report can't be written to .*file.*nothing was changed"):
        write_all(results, tmp_path / "file")
    monkeypatch.setattr("adapterzoo.ablation.reports.files.cells_latex", full_disk)
    with pytest.raises(RunsError, match="No space left on device; nothing was changed"):
        write_all(results, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def full_disk(*args):
    raise OSError(28, os.strerror(28))


def test_a_reader_meets_whole_files_while_a_report_is_written_again(tmp_path):
    wrong, stop = [], threading.Event()
    with together(tmp_path) as folder:
        (folder / "a").write_text("x" * 10_000)

    def look():
        while not stop.is_set():
            text = (tmp_path / "a").read_text()
            if len(text) != 10_000:
                wrong.append(len(text))

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(50):
        with together(tmp_path) as folder:
            (folder / "a").write_text("x" * 10_000)
    stop.set()
    thread.join()
    assert not wrong
