"""Pictures of a report: that they show the numbers of its tables, and can stand on any page."""

import re
from dataclasses import replace
from itertools import islice
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from adapterzoo.ablation.reports import texts
from adapterzoo.ablation.reports.pictures.curves import trajectories
from adapterzoo.ablation.reports.pictures.every import pictures
from adapterzoo.ablation.reports.pictures.forest import forests
from adapterzoo.ablation.reports.pictures.fronts import front_pictures
from adapterzoo.ablation.reports.pictures.heat import heat_maps
from adapterzoo.ablation.reports.pictures.lines import Quantity, line_picture, thinned
from adapterzoo.ablation.reports.pictures.material import MOST_PANELS, Material
from adapterzoo.ablation.reports.pictures.picture import Picture
from adapterzoo.ablation.reports.pictures.style import INK, PAPER, in_style, looks, slug, styled
from adapterzoo.ablation.reports.pictures.tuning import tuning_curves
from adapterzoo.ablation.reports.results import read
from tests.ablation_runs import write_runs

FAILED = [("DoRA(FLoRA(r=2))", seed) for seed in range(8)]
MISSING = [("DoRA(LoRA(r=2))", seed) for seed in range(8)] + [("MAP(LoRA(r=2))", 3)]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material(read(write_runs(tmp_path_factory.mktemp("runs"), failed=FAILED, missing=MISSING)))


@pytest.fixture(scope="module")
def every(material):
    return {picture.name: picture for picture in pictures(material)}


SOME = {"bare": 0.5, "MAP": float("nan")}


def made(folder, **how):
    """A small report."""
    few = {
        "generators": ["LoRA"],
        "wrappers": ["bare", "MAP"],
        "references": (),
        "rates": (),
        "examples": 0,
        "looks": 2,
    }
    return Material(read(write_runs(folder, **{**few, "axes": {}, **how})))


def words(picture):
    return [text.get_text() for axes in picture.figure.axes for text in axes.texts if text.get_text()]


def legend(picture):
    return [text.get_text() for found in picture.figure.legends for text in found.get_texts()]


def by_colour(axes):
    return {to_hex(line.get_color()): line for line in axes.get_lines()}


def test_every_kind_of_picture_is_there_for_every_panel(every):
    panels = ["curves", "effects_cells", "heat", "loss", "magnitude_alpha", "magnitude_beta", "magnitude_m", "rank"]
    of_panels = {f"{name}_r-{rank}" for name in [*panels, "tuning_lr"] for rank in (2, 8)}
    costs = {f"front_{cost}" for cost in ("adapter_parameters", "ms_per_step", "memory_bytes")}
    assert set(every) == {"effects", *of_panels, *costs}
    assert all(picture.alt and picture.title for picture in every.values())


def test_a_forest_draws_each_difference_with_both_of_its_intervals(material, every):
    rows = material.effects[material.effects["family"] == "primary"].to_dict("records")
    lines = every["effects"].figure.axes[0].get_lines()
    drawn = [100 * np.array([row["example_low"], row["example_high"]]) for row in rows]
    drawn += [100 * np.array([row["low"], row["high"]]) for row in rows]
    drawn += [100 * np.array([row["difference"]]) for row in rows]
    for values in drawn:
        assert any(np.allclose(line.get_xdata(), values) for line in lines if len(line.get_xdata()) == len(values))
    assert [label.get_text() for label in every["effects"].figure.axes[0].get_yticklabels()] == [
        r["wrapper"] for r in rows
    ]
    assert words(every["effects"]) == [text for row in rows if (text := said(row))]


def said(row):
    verdict = texts.verdict(row) if row["too_small"] else f"p = {row['p_adjusted']:.3f}{'*' if row['star'] else ''}"
    return f"{texts.difference_of(row, percent=True)}, {verdict}, n = {row['n']}"


def test_a_mark_is_filled_only_where_there_is_a_star(tmp_path):
    gain = {"MAP": 0.05, "DoRA": 0.0}
    found = made(
        tmp_path,
        wrappers=["bare", "MAP", "DoRA"],
        value=lambda cell, seed: 0.8 + gain.get(cell["wrapper"], 0) + 0.001 * (3 * seed % 7 + len(cell["cell"]) % 2),
    )
    primary, secondary = forests(found)
    for picture, family in ((primary, "primary"), (secondary, "secondary")):
        stars = found.effects[found.effects["family"] == family]["star"].tolist()
        marks = [line for line in picture.figure.axes[0].get_lines() if line.get_marker() == "o"]
        assert [to_hex(mark.get_markerfacecolor()) != PAPER for mark in marks] == stars
    assert found.effects["star"].any()
    assert not found.effects["star"].all()


def test_comparisons_without_pairs_keep_their_rows_in_a_forest(every):
    assert words(every["effects_cells_r-2"]).count("no pairs") == 2
    assert len(words(every["effects_cells_r-2"])) == 9


def test_a_forest_says_where_n_is_too_small_instead_of_a_p(material, every):
    rows = material.effects[(material.effects["family"] == "secondary") & (material.effects["panel"] == "r=2")]
    shown = words(every["effects_cells_r-2"])
    assert rows["too_small"].all()
    assert sum("n too small: 10 needed" in text for text in shown) == 7
    assert not any("p = " in text for text in shown)


def test_a_heat_map_writes_every_mean_and_says_what_is_missing(material, every):
    shown = words(every["heat_r-2"])
    for row in material.of_panel("r=2").to_dict("records"):
        if row["n"]:
            assert texts.amount(row["mean"], percent=True) in shown
    assert shown.count("failed") == 1
    assert shown.count("no runs yet") == 1
    assert sum("n = 7 of 8" in text for text in shown) == 1


def test_a_heat_map_puts_each_mean_where_its_labels_say(material, every):
    axes = every["heat_r-8"].figure.axes[0]
    columns = [label.get_text() for label in axes.get_xticklabels()]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    drawn = axes.get_images()[0].get_array()
    for cell in material.of_panel("r=8").to_dict("records"):
        place = rows.index(cell["wrapper"]), columns.index(cell["generator"])
        assert drawn[place] == pytest.approx(100 * cell["mean"])


def test_a_combination_that_is_not_in_the_grid_is_said_to_be(material):
    cells = material.cells
    fewer = Material(material.results)
    fewer.__dict__["cells"] = cells[cells["cell"] != "MAP(FLoRA(r=8))"]
    assert words(list(heat_maps(fewer))[1]).count("not in\nthe grid") == 1


def test_a_cell_whose_runs_gave_no_number_says_so(tmp_path):
    found = made(tmp_path, wrappers=["bare", "MAP"], seeds=2, value=lambda cell, seed: SOME[cell["wrapper"]])
    assert words(next(heat_maps(found))).count("no number") == 1


def test_panels_of_one_problem_share_their_shades_and_other_problems_have_their_own(tmp_path, every):
    def limits(picture):
        return picture.figure.axes[0].get_images()[0].get_clim()

    assert limits(every["heat_r-2"]) == limits(every["heat_r-8"])
    level = {"mnli": 0.5, "rte": 0.9}
    found = made(
        tmp_path, axes={"dataset": ["mnli", "rte"]}, options=["dataset"],
        value=lambda cell, seed: level[cell["axes"]["dataset"]] + 0.01 * len(cell["wrapper"]),
    )  # fmt: skip
    first, second = heat_maps(found)
    assert limits(first) == pytest.approx((53, 54))
    assert limits(second) == pytest.approx((93, 94))


def test_where_less_is_better_the_shades_turn_round_and_better_is_to_the_left(tmp_path):
    found = made(tmp_path, metric="loss", maximise=False, percent=False, value=lambda cell, seed: 1 + 0.1 * seed)
    assert next(heat_maps(found)).figure.axes[0].get_images()[0].get_cmap().name == "cividis_r"
    assert next(forests(found)).figure.axes[0].get_xlabel() == "difference: better to the left"


def test_the_front_is_numbered_and_zero_parameters_are_drawn(material, every):
    table = material.fronts[(material.fronts["cost"] == "adapter_parameters") & material.fronts["front"]]
    beside = words(every["front_adapter_parameters"])[-1].splitlines()[1:]
    names = [re.sub(r"^\d+ (.*): [\d.]+$", r"\1", line) for line in beside]
    assert names == table.sort_values("cost_value")["cell"].tolist()
    axes = every["front_adapter_parameters"].figure.axes[0]
    assert axes.get_xscale() == "symlog"
    assert any(line.get_xdata()[0] == 0 for line in axes.get_lines())


def test_problems_have_fronts_of_their_own(tmp_path):
    found = made(tmp_path, axes={"dataset": ["mnli", "rte"]}, options=["dataset"])
    names = [picture.name for picture in front_pictures(found)]
    assert "front_ms_per_step_dataset-mnli" in names
    assert len(names) == 6


def test_a_learning_curve_is_the_mean_of_the_seeds_and_its_band_their_range(material, every):
    points = material.curves[material.curves["name"] == "validation/accuracy"]
    own = 100 * points[points["cell"] == "MAP(FLoRA(r=8))"].groupby("step")["value"].agg(["mean", "min", "max"])
    axes = next(axes for axes in every["curves_r-8"].figure.axes if axes.get_title() == "FLoRA")
    colour = looks(material.wrappers, "bare")["MAP"].colour
    line = by_colour(axes)[colour]
    np.testing.assert_allclose(line.get_xdata(), own.index)
    np.testing.assert_allclose(line.get_ydata(), own["mean"])
    band = next(band for band in axes.collections if to_hex(band.get_facecolor()[0]) == colour)
    corners = band.get_paths()[0].vertices
    assert corners[:, 1].max() == pytest.approx(own["max"].max())
    assert corners[:, 1].min() == pytest.approx(own["min"].min())


def test_runs_that_failed_are_in_no_curve(material):
    assert "DoRA(FLoRA(r=2))" in set(material.results.runs["cell"])
    assert "DoRA(FLoRA(r=2))" not in set(material.curves["cell"])
    assert set(material.curves["seed"]) == set(range(8))


def test_long_curves_are_thinned_to_means_of_their_bins():
    steps = np.arange(1, 1001)
    points = pd.DataFrame({"run": "a", "cell": "c", "step": steps, "value": steps.astype(float)})
    found = thinned(points)
    assert len(found) == 60
    np.testing.assert_allclose(found["step"], found["value"])
    assert thinned(points[:60]).equals(points[:60])


def test_magnitudes_are_relative_to_each_layers_start_and_averaged(tmp_path):
    material = made(tmp_path, seeds=2)
    runs = [run for run in material.results.runs["run"] if run]
    start = {"first": 10.0, "second": 0.5}
    rows = [
        (run, step, f"magnitude/alpha/{layer}", start[layer] * (1 + step * rate))
        for run in runs for layer, rate in (("first", 0.01), ("second", 0.03)) for step in (0, 10)
    ]  # fmt: skip
    material.results.__dict__["curves"] = pd.DataFrame(rows, columns=["run", "step", "name", "value"])
    (picture,) = trajectories(material)
    lines = picture.figure.axes[0].get_lines()
    assert sorted(round(float(line.get_ydata()[-1]), 6) for line in lines) == [1.1, 1.1, 1.2, 1.2, 1.3, 1.3]
    assert all(line.get_ydata()[0] == 1 for line in lines)
    assert "relative" in picture.title


def test_a_magnitude_that_starts_at_zero_is_told_as_it_is(tmp_path):
    material = made(tmp_path, seeds=1)
    rows = [(run, step, "magnitude/gate/a", 0.5 * step) for run in material.results.runs["run"] for step in (0, 1)]
    material.results.__dict__["curves"] = pd.DataFrame(rows, columns=["run", "step", "name", "value"])
    (picture,) = trajectories(material)
    assert "relative" not in picture.title
    assert list(picture.figure.axes[0].get_lines()[0].get_ydata()) == [0, 0.5]


def test_the_search_marks_what_was_chosen_and_where_that_is_an_end(material, every):
    axes = next(axes for axes in every["tuning_lr_r-8"].figure.axes if axes.get_title() == "LoRA")
    look = looks(material.wrappers, "bare")
    cells = material.of_panel("r=8")
    for row in cells[cells["generator"] == "LoRA"].to_dict("records"):
        own = [line for line in axes.get_lines() if to_hex(line.get_color()) == look[row["wrapper"]].colour]
        (mark,) = (line for line in own if line.get_marker() in ("o", "^"))
        assert mark.get_xdata()[0] == row["option/lr"]
        assert mark.get_marker() == ("^" if row["edge"] else "o")
        (line,) = (line for line in own if line.get_marker() == ".")
        assert mark.get_ydata()[0] == max(line.get_ydata())
    assert {"None", "Full"} <= set(legend(every["tuning_lr_r-8"]))


def test_of_two_options_the_chosen_point_is_marked_not_the_best_of_its_column(tmp_path):
    material = made(tmp_path, wrappers=["bare"], rates=(1e-3, 1e-2, 1e-1))
    runs = material.results.runs
    runs["option/xlr"] = runs["option/lr"].map({1e-3: 1.0, 1e-2: 2.0, 1e-1: 3.0})
    other = runs[runs["role"] == "tune"].assign(**{"option/xlr": 9.0, "validation/accuracy": 0.99})
    both = pd.concat([runs.assign(edge="xlr lowest"), other], ignore_index=True)
    results = replace(material.results, tuned=("lr", "xlr"), runs=both)
    for picture, mark in zip(tuning_curves(Material(results)), ("o", "^"), strict=True):
        points, ring = picture.figure.axes[0].get_lines()
        assert ring.get_ydata()[0] < 99
        assert ring.get_marker() == mark
        assert points.get_linestyle() == "None"


def test_values_that_are_no_numbers_have_places_of_their_own(tmp_path):
    material = made(tmp_path, rates=(1e-3, 1e-2, 1e-1))
    runs = material.results.runs
    runs["option/lr"] = runs["option/lr"].map({1e-3: "low", 1e-2: "middle", 1e-1: True}).astype(object)
    (picture,) = tuning_curves(material)
    shown = [label.get_text() for label in picture.figure.axes[0].get_xticklabels()]
    assert sorted(shown) == ["True", "low", "middle"]


def test_a_wrapper_has_one_look_everywhere_and_twelve_wrappers_have_twelve():
    names = [f"W{number}" for number in range(12)]
    found = looks(["bare", *names], "bare")
    assert found["bare"].colour == INK
    assert len(set(found.values())) == 13
    assert looks(["bare", "W0", "W1"], "bare").items() <= found.items()


@pytest.mark.parametrize("dpi", [72, 150])
def test_no_text_is_cut_off(every, dpi):
    for picture in every.values():
        figure = picture.figure
        figure.set_dpi(dpi)
        with styled():
            figure.draw_without_rendering()
            drawn = figure.get_tightbbox()
        assert drawn.x0 > 0, picture.name
        assert drawn.y0 > 0, picture.name
        assert drawn.x1 < figure.get_figwidth(), picture.name
        assert drawn.y1 < figure.get_figheight(), picture.name


def test_saving_twice_gives_the_same_bytes(every, tmp_path):
    for ending in (".svg", ".png"):
        for name in ("first", "second"):
            every["heat_r-2"].save(tmp_path / f"{name}{ending}")
        assert (tmp_path / f"first{ending}").read_bytes() == (tmp_path / f"second{ending}").read_bytes()
    assert (tmp_path / "first.png").read_bytes().startswith(b"\x89PNG")
    assert b"#ffffff" in (tmp_path / "first.svg").read_bytes()
    assert every["heat_r-2"].svg() == every["heat_r-2"].svg()


def test_elements_for_a_page_are_whole_share_no_name_and_take_the_readers_colours(every):
    seen: set[str] = set()
    for picture in list(every.values())[:6]:
        text = picture.svg()
        root = ElementTree.fromstring(text)
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids))
        assert not seen & set(ids)
        seen |= set(ids)
        used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)
        assert {first or second for first, second in used} == set(ids)
        assert "currentColor" in text
        assert INK not in text
        assert PAPER not in text
        assert root.get("viewBox")
        assert root.get("width") is None
        assert not re.search(r"<metadata|<script|<!DOCTYPE|<\?xml", text)
    assert seen


NASTY = "<script>x</script> & \"'$\\frac$ \x07 " + "long " * 30


def test_labels_are_text_whatever_is_in_them():
    @in_style
    def draw():
        figure = Figure(layout="constrained")
        figure.subplots().set(title=NASTY.replace("\x07", ""), xlabel="漢字 🙂")
        return Picture("nasty", "heat", "", "title", "alt", figure)

    text = draw().svg()
    root = ElementTree.fromstring(text)
    assert "<script" not in text
    assert any("<script>x</script> & \"'$\\frac$" in (element.text or "") for element in root.iter())


def test_a_grid_of_nasty_names_is_drawn(tmp_path):
    names = [NASTY, "_hidden", "漢字 🙂"]
    found = made(tmp_path, generators=names, seeds=1, rates=(1e-3, 1e-2, 1e-1), axes={"$x$": [NASTY]})
    every = {picture.name: picture.svg() for picture in pictures(found)}
    assert all(re.fullmatch(r"[\w.-]+", name, re.ASCII) for name in every)
    for text in every.values():
        ElementTree.fromstring(text)
        assert "<script" not in text


def test_pictures_whose_names_would_be_the_same_are_numbered(tmp_path):
    found = made(tmp_path, wrappers=["bare"], seeds=1, axes={"x": ["é", "è"]}, options=["x"])
    assert [picture.name for picture in islice(pictures(found), 2)] == ["heat_x", "heat_x_2"]


def test_names_of_files_hold_nothing_that_a_file_system_minds():
    assert slug("heat", "dataset=mnli, r=2") == "heat_dataset-mnli_r-2"
    assert slug("heat", "../../etc/x") == "heat_etc_x"
    assert len(slug("heat", "x" * 300)) == 80


def test_nothing_is_drawn_where_nothing_is_done(tmp_path):
    cells = ["LoRA()", "MAP(LoRA())"]
    found = made(tmp_path, seeds=2, missing=[(cell, seed) for cell in cells for seed in range(2)])
    assert list(pictures(found)) == []


def test_one_run_of_one_cell_is_drawn(tmp_path):
    found = made(tmp_path, wrappers=["bare"], seeds=1)
    assert [picture.name for picture in pictures(found)] == ["heat", "curves", "loss"]


def test_of_very_many_panels_the_first_are_drawn(tmp_path):
    found = made(tmp_path, seeds=1, looks=1, axes={"r": list(range(1, MOST_PANELS + 3))})
    assert len(found.panels) == MOST_PANELS + 2
    assert found.drawn == found.panels[:MOST_PANELS]


def test_references_belong_to_the_panels_whose_values_they_have(tmp_path):
    material = made(tmp_path, references=["None"], axes={"r": [2, 8]})
    for panel in material.panels:
        assert material.references(panel)["cell"].tolist() == ["None"]
    material.cells["axis/r"] = [8, *material.cells["axis/r"][1:]]
    assert [len(material.references(panel)) for panel in material.panels] == [0, 1]


def test_a_picture_of_lines_is_none_where_no_cell_of_the_panel_has_points(material):
    points = material.curves[material.curves["cell"] == "MAP(LoRA(r=8))"]
    quantity = Quantity("x", "curves", "x", "x")
    assert line_picture(material, "r=2", points, quantity) is None
    picture = line_picture(material, "r=8", points[points["name"] == "loss"], quantity)
    assert picture is not None
    assert [axes.get_title() for axes in picture.figure.axes] == ["LoRA"]
