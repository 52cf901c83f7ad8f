"""The page of a report: what it says, that nothing in it acts, and how it looks and works in a browser."""

import argparse
import json
import os
import re
import shutil
from base64 import b64encode
from hashlib import sha256
from html import unescape
from pathlib import Path

import pytest

from adapterzoo.ablation import command
from adapterzoo.ablation.reports import command as report
from adapterzoo.ablation.reports.page import failures as failing
from adapterzoo.ablation.reports.page import listing
from adapterzoo.ablation.reports.page.about import Field, facts, fields, warnings
from adapterzoo.ablation.reports.page.failures import failures
from adapterzoo.ablation.reports.page.listing import cells_table, effects_tables, runs_table
from adapterzoo.ablation.reports.page.page import page
from adapterzoo.ablation.reports.page.sentences import headline, sentences
from adapterzoo.ablation.reports.pictures.material import MOST_PANELS, Material
from adapterzoo.ablation.reports.results import read
from adapterzoo.cli import main
from adapterzoo.errors import CommandError, RunsError
from tests.ablation_runs import ENVIRONMENT, TRACEBACK, write_runs

REPO = Path(__file__).parent.parent
ARTEFACTS = REPO / "artefacts" / "report"
CHROMIUM = "/usr/bin/chromium"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
FAILED = [("MAP(LoRA(r=2))", 3), ("DoRA(LoRA(r=2))", 3)]
MISSING = [("DoRA(FLoRA(r=8))", 1)]
TEXTS = "all => all.map(one => one.textContent)"
SCRIPT = "<script>window.hacked = 1</script>"


def small(folder, **how):
    """A small report."""
    few = {"generators": ["LoRA"], "wrappers": ["bare", "MAP"], "references": (), "rates": (), "axes": {}, "others": 0}
    return Material(read(write_runs(folder, **{**few, "examples": 0, "looks": 2, **how})))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material(read(write_runs(tmp_path_factory.mktemp("runs"), failed=FAILED, missing=MISSING)))


@pytest.fixture(scope="module")
def written(material, tmp_path_factory):
    """The page with its pictures, as the command writes it."""
    (path,) = report.write_report(material, tmp_path_factory.mktemp("out"), ["html"])
    return path


def rewrite(folder, change):
    """Change the environment records of runs."""
    paths = sorted(folder.glob("*/environment.json"))
    for number, path in enumerate(paths):
        record = json.loads(path.read_text())
        change(number, record)
        path.write_text(json.dumps(record))


# What the sentences say.


def differences(by_wrapper):
    """A metric with the differences that are given, one a seed."""
    return lambda cell, seed: 0.8 + (by_wrapper[cell["wrapper"]][seed] if cell["wrapper"] in by_wrapper else 0)


TOGETHER = "Of 1 wrapper tested together,"
ABOVE = [0.02, 0.03, 0.02, 0.03, 0.02, 0.03, 0.02, 0.04]
AROUND = [0.02, -0.03, 0.02, -0.02, 0.01, -0.03, 0.02, 0.01]


def test_a_significant_difference_is_said_with_its_interval_pairs_and_correction(tmp_path):
    found = small(tmp_path, value=differences({"MAP": ABOVE}))
    assert headline(found) == f"{TOGETHER} MAP (better) differs significantly from the bare generator."
    (sentence,) = sentences(found)
    assert sentence.startswith("MAP: +2.6 points against the bare generator (better), 95 % interval [+2.0, +3.2] (")
    assert "(n = 8 pairs)" in sentence
    assert "The interval does not contain zero." in sentence
    assert "Significant: p = 0.008 after Holm's correction for 1 test." in sentence


def test_an_interval_that_contains_zero_is_called_that(tmp_path):
    found = small(tmp_path, value=differences({"MAP": AROUND}))
    assert headline(found) == f"{TOGETHER} none differs significantly from the bare generator."
    (sentence,) = sentences(found)
    assert "The interval contains zero: these runs do not tell better from worse." in sentence
    assert "Not significant: p = 1.000" in sentence


def test_an_interval_below_zero_does_not_contain_it(tmp_path):
    (sentence,) = sentences(small(tmp_path, value=differences({"MAP": [-x for x in ABOVE]})))
    assert sentence.startswith("MAP: -2.6 points against the bare generator (worse)")
    assert "The interval does not contain zero." in sentence


def test_too_few_pairs_are_said_with_the_number_needed_and_nothing_is_called_significant(tmp_path):
    found = small(tmp_path, seeds=5, value=differences({"MAP": ABOVE}))
    assert headline(found) == "n is too small for any of 1 test: nothing can be called significant here."
    (sentence,) = sentences(found)
    assert "n too small: 1 test needs 6 pairs, and there are 5" in sentence
    assert "no significance can be claimed" in sentence
    assert "Significant" not in sentence


def test_one_wrapper_with_too_few_pairs_is_set_apart_in_the_headline(tmp_path):
    found = small(
        tmp_path, wrappers=["bare", "MAP", "DoRA"], missing=[("DoRA(LoRA())", 0), ("DoRA(LoRA())", 1)],
        value=differences({"MAP": ABOVE, "DoRA": ABOVE}),
    )  # fmt: skip
    said = "MAP (better) differs significantly from the bare generator. For 1 of them n is too small."
    assert headline(found) == f"Of 2 wrappers tested together, {said}"


def test_equal_differences_are_said_to_be(tmp_path):
    found = small(tmp_path, value=differences({"MAP": [0.0] * 8}))
    (sentence,) = sentences(found)
    assert sentence.startswith("MAP: all 8 differences from the bare generator are equal, +0.0 points (n = 8 pairs).")
    assert "nan" not in sentence


def test_where_less_is_better_a_smaller_value_is_called_better(tmp_path):
    value = differences({"MAP": [-x for x in ABOVE]})
    found = small(tmp_path, metric="perplexity", maximise=False, percent=False, value=value)
    assert "MAP (better)" in headline(found)
    assert sentences(found)[0].startswith("MAP: -0.02625 against the bare generator (better)")


def test_one_pair_no_pair_no_bare_and_no_wrapper_are_said(tmp_path):
    one = small(tmp_path / "one", seeds=1)
    assert "One pair has no interval." in sentences(one)[0]
    none = small(tmp_path / "none", seeds=2, missing=[("MAP(LoRA())", 0), ("MAP(LoRA())", 1)])
    assert sentences(none) == ["MAP: no pair of runs is done yet."]
    assert headline(none) == "No wrapper has a pair of finished runs yet, so there is nothing to compare."
    alone = small(tmp_path / "alone", wrappers=["MAP"])
    assert sentences(alone) == ["MAP: there is no bare generator to compare it with."]
    assert headline(alone) == "The grid has no bare generator, so no wrapper can be compared."
    bare = small(tmp_path / "bare", wrappers=["bare"])
    assert sentences(bare) == []
    assert headline(bare) == "The grid has no wrapper to compare with a bare generator."


def test_an_average_says_of_how_many_cells(material):
    assert all("each the mean of 6 cells" in sentence for sentence in sentences(material))


# What was run, and what to know first.


def test_what_was_run_is_told(material):
    told = dict(facts(material, fields(material.results.environments)))
    assert told["task"] == ["digits"]
    assert told["generators"] == ["LoRA(r={r})", "FLoRA(r={r})", "AdaLoRA(r={r})"]
    assert told["r"] == ["2, 8"]
    assert told["seeds"] == ["0, 1, 2, 3, 4, 5, 6, 7"]
    assert told["references"] == ["None", "Full()"]
    assert told["search"] == ["lr values [0.0001, 0.001, 0.01]: 3 points for every cell, on validation, seed 1000"]
    assert told["compared by"] == ["test/accuracy, more is better"]
    assert told["runs"] == ["283 done, 2 failed, 1 missing"]
    assert told["machine"][:2] == ["cpu model: some CPU", "cpu cores: 4"]
    assert told["code"] == ["c"]
    assert told["data"] == ["d"]


def test_dates_go_from_the_first_run_to_the_last(tmp_path):
    write_runs(tmp_path, generators=["LoRA"], wrappers=["bare"], references=(), rates=(), seeds=3, examples=0)
    rewrite(tmp_path, lambda number, record: record.update(time=f"2026-03-0{number + 1}T10:00:00+00:00"))
    found = Material(read(tmp_path))
    (dates,) = dict(facts(found, []))["dates"]
    assert re.fullmatch(r"2026-03-0\dT10:00:00\+00:00 to 2026-03-0\dT10:00:00\+00:00", dates)
    assert dates[:10] < dates[29:39]


def test_unfinished_runs_other_grids_and_edges_are_warned_of(material):
    told = warnings(material, [])
    assert told[:3] == [
        "2 of 208 reported runs have failed.",
        "1 of 208 reported runs has not ended.",
        "1 run of other grids in the folder, not shown",
    ]
    edges = int(material.cells["edge"].astype(bool).sum())
    assert told[3].startswith(f"{edges} of 26 cells are at an end of what the search tried")
    assert "lr 0.0001 (lowest)" in told[3]
    assert f"and {edges - 6} more" in told[3]


def test_runs_from_different_machines_or_packages_are_warned_of(tmp_path):
    def change(number, record):
        record["packages"]["torch"] = "2.12.0" if number == 0 else "2.13.0"
        record["host"] = f"node{number}"
        record["time"] = str(number)
        if number == 1:
            record.clear()

    found = small(tmp_path)
    rewrite(tmp_path, change)
    (told,) = warnings(found, fields(read(tmp_path).environments))
    assert told.startswith(
        "The runs of this report are not from one machine with one set of packages: packages.torch: "
    )
    parts = told.rstrip(".").rpartition("torch: ")[2].split(", ")
    assert sorted(parts) == ["2.12.0 (1 run)", "2.13.0 (14 runs)", "not recorded (1 run)"]
    assert warnings(found, fields(found.results.environments)) == []


@pytest.mark.parametrize("name", ["cpu.model", "gpus", "packages.whatever", "threads"])
def test_fields_that_decide_what_is_computed_may_not_differ(name):
    assert Field(name, (("a", 1), ("b", 1))).differs
    assert not Field(name, (("a", 1), ("not recorded", 1))).differs


@pytest.mark.parametrize("name", ["host", "time", "process", "variables.SLURM_JOB_ID"])
def test_other_fields_may_differ(name):
    assert not Field(name, (("a", 1), ("b", 1))).differs


def test_a_field_with_many_values_tells_some():
    told = Field("time", tuple((str(number), 1) for number in range(40))).told
    assert told.startswith("40 different values: 0 (1 run), ")
    assert told.endswith(", 5 (1 run), ...")


def test_damaged_records_are_warned_of(tmp_path):
    found = small(tmp_path)
    run = found.results.runs["run"].iloc[0]
    (tmp_path / run / "result.json").write_text("{")
    again = Material(read(tmp_path))
    assert any(run in told for told in warnings(again, []))


def test_of_very_many_panels_it_is_said_that_some_are_drawn(tmp_path):
    found = small(tmp_path, wrappers=["bare"], seeds=1, looks=1, axes={"r": list(range(1, MOST_PANELS + 2))})
    said = f"Pictures show the first {MOST_PANELS} of {MOST_PANELS + 1} panels; the tables have all."
    assert said in warnings(found, [])


# The tables.


def column(table, name):
    return next(column.entries for column in table.columns if column.name == name)


def test_the_cells_table_has_every_cell_with_its_numbers(material):
    table = cells_table(material)
    rows = material.cells.to_dict("records")
    assert [entry.text for entry in column(table, "cell")] == [row["cell"] for row in rows]
    assert [entry.key for entry in column(table, "test/accuracy")] == [row["mean"] for row in rows]
    assert [entry.text for entry in column(table, "n")] == [str(row["n"]) for row in rows]
    starred = set(material.effects[material.effects["star"].astype(bool)]["cell"])
    against = zip(column(table, "cell"), column(table, "against bare"), strict=True)
    assert {cell.text for cell, entry in against if entry.text.endswith("*")} == starred - {""}


def test_the_runs_table_has_every_run_and_of_very_many_the_unfinished_first(material, monkeypatch):
    assert len(runs_table(material).rows) == len(material.results.runs)
    monkeypatch.setattr(listing, "MOST_RUNS", 4)
    table = runs_table(material)
    assert [entry.text for entry in column(table, "status")] == ["failed", "failed", "missing", "done"]
    assert table.caption == "4 of 286 runs, those that failed or are missing first; runs.csv has all"


def test_the_primary_family_comes_first_and_verdicts_are_words(material):
    primary, secondary = effects_tables(material)
    assert (primary.name, secondary.name) == ("effects-primary", "effects-secondary")
    assert len(primary.rows) == 3
    assert len(secondary.rows) == 18
    assert {entry.text for entry in column(secondary, "verdict")} == {"n too small: 10 needed"}
    assert not any("too small" in entry.text for entry in column(secondary, "note"))
    assert any("7 of 8 pairs: seed 3" in entry.text for entry in column(secondary, "note"))


def test_failures_with_one_error_stand_together(material, monkeypatch):
    (failure,) = failures(material)
    assert failure.count == "2 runs"
    assert failure.error == "ValueError: the loss is <NaN> & more second line"
    assert failure.traceback == TRACEBACK
    assert [run.rpartition(" (")[0] for run in failure.shown] == [
        "MAP(LoRA(r=2)), report, seed 3",
        "DoRA(LoRA(r=2)), report, seed 3",
    ]
    monkeypatch.setattr(failing, "_MOST_NAMED", 1)
    assert len(failure.shown) == 1
    assert failure.more == "and 1 more"


# The file.


def test_a_page_is_small_and_always_the_same(material, written):
    assert written.stat().st_size < 1_500_000  # 26 cells of 8 seeds
    assert page(Material(read(material.results.folder)), []) == page(material, [])


def test_the_page_loads_nothing_and_runs_its_own_script_alone(written):
    text = written.read_text()
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 1
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert "default-src 'none'" in policy
    assert f"'sha256-{b64encode(sha256(scripts[0].encode()).digest()).decode()}'" in policy
    assert "'unsafe-inline'" not in policy.partition("script-src")[2].partition(";")[0]
    assert not re.search(r"""(?:src|srcset|action|data)=["']|@import|url\((?!#)""", text)
    links = re.findall(r'href="([^"]*)"', text)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not re.search(r"\son\w+=", text)


def test_whatever_a_grid_or_an_error_says_is_text(tmp_path):
    wrappers = ["bare", '"><img src=x onerror=alert(1)>']
    folder = small(tmp_path, generators=[SCRIPT], wrappers=wrappers, seeds=1).results.folder
    grid = json.loads((folder / "grid.json").read_text())
    grid["grid"]["name"] = f"</title>{SCRIPT}"
    grid["grid"]["task"]["note"] = SCRIPT
    (folder / "grid.json").write_text(json.dumps(grid))
    for path in sorted(folder.glob("*/result.json"))[:1]:
        error = {"type": "E", "message": SCRIPT, "traceback": f"</pre>{SCRIPT}"}
        path.write_text(json.dumps({"status": "failed", "metrics": {}, "seconds": 1, "error": error}))
    rewrite(folder, lambda number, record: record.update(cpu={"model": SCRIPT}))
    text = page(Material(read(folder)))
    assert text.count("<script") == 1
    assert "<img" not in text
    assert "</title><" not in text
    assert unescape(text).count(SCRIPT) > 10


def test_headers_captions_and_pictures_are_told_to_those_who_do_not_see_them(written):
    text = written.read_text()
    assert text.count("<table") == text.count("<caption>") == 5
    assert text.count("<th ") == text.count("<th scope=")
    assert '<html lang="en">' in text
    assert re.findall(r"<(h\d)", text)[0] == "h1"
    alts = re.findall(r'role="img" aria-label="([^"]*)"', text)
    assert len(alts) == text.count("<svg") == 22
    assert all(len(alt) > 40 for alt in alts)


def test_a_page_of_150_cells_is_bounded(tmp_path):
    found = small(
        tmp_path, generators=["LoRA", "FLoRA", "AdaLoRA"], wrappers=["bare", "MAP", "DoRA", "PreDiag", "SORA(PreDiag)"],
        axes={"r": list(range(1, 11))}, seeds=2,
    )  # fmt: skip
    text = page(found, [])
    assert len(text.encode()) < 1_000_000
    assert text.count("<tr>") > 150 + 300 + 120


# The command.


def ask(*words):
    parser = argparse.ArgumentParser()
    command.add_report(parser.add_subparsers())
    return parser.parse_args(["report", *map(str, words)])


def test_the_command_writes_every_format_beside_the_runs_and_prints_the_table(tmp_path, capsys):
    folder = small(tmp_path, seeds=2).results.folder
    assert main(["report", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "wrapper less bare" in printed
    assert f"open {folder / 'report' / 'report.html'} in a browser" in printed
    endings = {path.suffix for path in (folder / "report").rglob("*") if path.is_file()}
    assert endings == set(report.FORMATS.values())
    assert {path.name for path in (folder / "report" / "pictures").iterdir()} >= {"heat.png", "heat.svg", "effects.png"}
    assert read(folder).others == 0  # a report in the folder of runs is no run
    assert sorted(path.name for path in (folder / "report").iterdir() if path.name.startswith(".")) == []


def test_formats_are_chosen_and_nothing_else_is_written(tmp_path):
    material = small(tmp_path / "runs", seeds=2)
    paths = report.write_report(material, tmp_path / "out", ["csv", "latex"])
    assert {path.suffix for path in paths} == {".csv", ".tex"}
    assert all(path.is_file() for path in paths)
    assert set(tmp_path.joinpath("out").rglob("*")) == set(paths)


def test_unknown_formats_are_refused_together_with_the_nearest(tmp_path):
    folder = small(tmp_path, seeds=1).results.folder
    with pytest.raises(CommandError) as refused:
        report.run(ask(folder, "--format", "htlm,csv,excel"))
    assert "'htlm'" in str(refused.value)
    assert "did you mean 'html'" in str(refused.value)
    assert "'excel'" in str(refused.value)
    assert not (folder / "report").exists()
    with pytest.raises(CommandError, match="--format names none"):
        report.run(ask(folder, "--format", " , "))


def test_formats_of_the_parser_are_those_that_can_be_written():
    assert tuple(report.FORMATS) == command.FORMATS
    assert ask("runs").format.split(",") == list(report.FORMATS)


def test_a_folder_without_runs_is_refused_by_name(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_report_that_can_not_be_finished_changes_nothing(tmp_path, monkeypatch):
    material = small(tmp_path / "runs", seeds=2)
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "page", full)
    with pytest.raises(RunsError, match=r"can't be written .* No space left on device; nothing was changed"):
        report.write_report(material, out, ["csv", "html"])
    assert [path.name for path in out.iterdir()] == ["report.html"]
    assert (out / "report.html").read_text() == "before"


# In a browser.


@pytest.fixture(scope="module")
def browser():
    needed = os.environ.get("ADAPTERZOO_NEED_BROWSER") == "1"
    if not Path(CHROMIUM).exists():
        (pytest.fail if needed else pytest.skip)(f"there is no {CHROMIUM}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield launched
        launched.close()


@pytest.fixture
def opened(browser):
    """Opens a page; at the end nothing but the page was asked for, and nothing went wrong."""
    contexts, asked, wrong = [], [], []

    def open_page(path, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("dialog", lambda dialog: wrong.append(dialog.message))
        tab.goto(path.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
    assert {url.partition("#")[0].rpartition(".")[2] for url in asked} == {"html"}
    assert all(url.startswith("file://") for url in asked)
    assert len(asked) == len(contexts)


def keep(tab, name):
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=ARTEFACTS / f"{name}.png", full_page=True)


def texts_of(tab, table, place):
    cells = f"#{table}-table tbody tr:not([hidden]) td:nth-child({place})"
    return tab.eval_on_selector_all(cells, TEXTS)


def place_of(tab, table, name):
    names = tab.eval_on_selector_all(f"#{table}-table thead th", TEXTS)
    return names.index(name) + 1


def sideways(tab):
    return tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_the_page_shows_its_sections_and_every_picture_has_a_size(opened, written):
    tab = opened(written)
    for link in tab.query_selector_all("nav a"):
        assert tab.query_selector(link.get_attribute("href")) is not None
    assert "tested together" in tab.inner_text(".headline")
    assert "not ended" in tab.inner_text(".warnings")
    tab.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
    sizes = tab.eval_on_selector_all("svg", "all => all.map(one => [one.clientWidth, one.clientHeight])")
    assert len(sizes) == 22
    assert all(width > 300 and height > 150 for width, height in sizes)
    assert sideways(tab) == 0
    keep(tab, "light")


def test_pictures_of_further_panels_are_folded(opened, written):
    tab = opened(written)
    shown = tab.eval_on_selector_all("#heat .picture", "all => all.map(one => one.checkVisibility())")
    assert shown == [True, False]
    tab.click("#heat summary")
    assert tab.eval_on_selector_all("#heat .picture", "all => all.every(one => one.checkVisibility())")


def test_a_click_on_a_header_sorts_by_numbers_up_down_and_back_with_gaps_last(opened, written):
    tab = opened(written)
    place = place_of(tab, "cells", "parameters")
    header = f"#cells-table thead th:nth-child({place})"
    before = texts_of(tab, "cells", 1)

    def numbers():
        return [int(text.replace(",", "")) for text in texts_of(tab, "cells", place) if text]

    assert tab.get_attribute(header, "aria-sort") == "none"
    tab.click(f"{header} button")
    assert tab.get_attribute(header, "aria-sort") == "ascending"
    assert numbers() == sorted(numbers())
    tab.click(f"{header} button")
    assert tab.get_attribute(header, "aria-sort") == "descending"
    assert numbers() == sorted(numbers(), reverse=True)
    gaps = place_of(tab, "cells", "against bare")
    for _ in range(2):
        tab.click(f"#cells-table thead th:nth-child({gaps}) button")
        assert [bool(text) for text in texts_of(tab, "cells", gaps)] == [True] * 18 + [False] * 8
    signed = [float(text.split()[0]) for text in texts_of(tab, "cells", gaps) if text]
    assert signed == sorted(signed, reverse=True)
    assert signed[0] > 0 > signed[-1]
    assert tab.get_attribute(header, "aria-sort") == "none"
    tab.click(f"#cells-table thead th:nth-child({gaps}) button")
    assert texts_of(tab, "cells", 1) == before


def test_sorting_works_from_the_keyboard(opened, written):
    tab = opened(written)
    tab.focus("#cells-table thead th:nth-child(2) button")
    tab.keyboard.press("Enter")
    assert tab.get_attribute("#cells-table thead th:nth-child(2)", "aria-sort") == "ascending"
    shown = texts_of(tab, "cells", 2)
    assert shown == sorted(shown)
    assert shown[0] == "AdaLoRA"


def test_rows_are_filtered_by_text_generator_wrapper_and_panel_together(opened, written):
    tab = opened(written)
    bar = "#cells-listing .filters"
    assert tab.inner_text(f"{bar} output") == "26 of 26 rows"
    tab.select_option(f"{bar} label:has-text('generator') select", label="FLoRA")
    assert set(texts_of(tab, "cells", 2)) == {"FLoRA"}
    tab.select_option(f"{bar} label:has-text('panel') select", label="r=8")
    assert tab.inner_text(f"{bar} output") == "4 of 26 rows"
    tab.select_option(f"{bar} label:has-text('wrapper') select", label="MAP")
    assert texts_of(tab, "cells", 1) == ["MAP(FLoRA(r=8))"]
    for name in ("generator", "panel", "wrapper"):
        tab.select_option(f"{bar} label:has-text('{name}') select", label="all")
    tab.fill(f"{bar} input", "R=8  map(")
    assert texts_of(tab, "cells", 1) == ["MAP(LoRA(r=8))", "MAP(FLoRA(r=8))", "MAP(AdaLoRA(r=8))"]
    assert tab.inner_text(f"{bar} output") == "3 of 26 rows"
    tab.fill(f"{bar} input", "nothing like it")
    assert tab.inner_text(f"{bar} output") == "0 of 26 rows"


def test_runs_are_filtered_by_how_they_ended(opened, written):
    tab = opened(written)
    tab.select_option("#runs-listing label:has-text('status') select", label="failed")
    assert texts_of(tab, "runs", 2) == ["MAP(LoRA(r=2))", "DoRA(LoRA(r=2))"]
    assert tab.inner_text("#runs-listing output") == "2 of 286 rows"


def test_a_traceback_is_folded_and_shown_as_it_is(opened, written):
    tab = opened(written)
    assert not tab.is_visible("#failed pre")
    tab.click("#failed summary")
    assert tab.inner_text("#failed pre").strip() == TRACEBACK.strip()
    assert tab.inner_text("#failed summary") == "ValueError: the loss is <NaN> & more second line (2 runs)"


def luminance(tab, selector, name):
    value = tab.eval_on_selector(selector, f"one => getComputedStyle(one).{name}")
    parts = [int(part) / 255 for part in re.findall(r"\d+", value)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(opened, written, scheme):
    tab = opened(written, scheme=scheme)
    ground = luminance(tab, "body", "backgroundColor")
    assert (ground < 0.02) == (scheme == "dark")
    texts = {"p": "color", ".note": "color", "nav a": "color", "#runs-table td": "color", ".picture svg text": "fill"}
    for selector, name in texts.items():
        lighter, darker = sorted([luminance(tab, selector, name), ground], reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) > 4.5, selector
    if scheme == "dark":
        keep(tab, "dark")


def test_a_phone_never_scrolls_the_page_sideways(opened, written):
    tab = opened(written, width=360)
    tab.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
    assert sideways(tab) == 0
    wide = tab.eval_on_selector("#cells .scroll", "one => one.scrollWidth > one.clientWidth")
    assert wide  # the table scrolls by itself
    keep(tab, "phone")


def test_paper_has_every_picture_and_no_controls(opened, written):
    tab = opened(written, width=720)
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    tab.emulate_media(media="print")
    assert tab.eval_on_selector_all(".picture", "all => all.every(one => one.checkVisibility())")
    assert not tab.is_visible(".filters >> nth=0")
    assert not tab.is_visible("#failed pre")
    assert sideways(tab) == 0
    keep(tab, "print")
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert not tab.eval_on_selector("#heat details", "one => one.open")


def test_pages_of_one_cell_and_of_no_run_open(opened, tmp_path):
    one = small(tmp_path / "one", wrappers=["bare"], seeds=1).results.folder
    none = small(tmp_path / "none", seeds=1).results.folder
    for path in none.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    for folder, title in ((one, "The grid has no wrapper"), (none, "No wrapper has a pair of finished runs yet")):
        (path,) = report.write_report(Material(read(folder)), folder / "report", ["html"])
        tab = opened(path)
        assert tab.inner_text(".headline").startswith(title)
        assert sideways(tab) == 0
        keep(tab, folder.name)


def test_a_script_in_a_name_or_an_error_does_not_run(opened, tmp_path):
    found = small(tmp_path, generators=[SCRIPT], seeds=1, failed=[(f"{SCRIPT}()", 0)])
    (path,) = report.write_report(found, tmp_path / "report", ["html"])
    tab = opened(path)
    assert tab.evaluate("window.hacked") is None
    assert SCRIPT in tab.inner_text("#cells-table")


def test_the_environment_is_told_field_by_field(opened, written):
    tab = opened(written)
    tab.click("#environment summary")
    names = tab.eval_on_selector_all("#environment tbody th", TEXTS)
    told = dict(zip(names, tab.eval_on_selector_all("#environment tbody td", TEXTS), strict=True))
    assert told["packages.torch"] == ENVIRONMENT["packages"]["torch"]
    assert told["gpus"] == "none"
