"""Grids: what they say, what they come to, and what is wrong with them."""

import re

import pytest

from adapterzoo.ablation.grids.cells import cells
from adapterzoo.ablation.grids.checking import check
from adapterzoo.ablation.grids.outline import Outline
from adapterzoo.ablation.grids.reading import read_yaml
from adapterzoo.ablation.grids.tune import Tune, best
from adapterzoo.errors import GridError
from tests import ablation_toys

EXAMPLE = """
task: {name: toy, width: 7}
grid:
  spec: ["LoRA(r={r})", "AdaLoRA(r={r})", "FLoRA(r={r})"]
  wrap: ["{spec}", "MAP({spec})", "DoRA({spec})", "PreDiag({spec})", "SORA(PreDiag({spec}))"]
  r: [1, 2, 3]
  seed: {count: 8}
tune: {lr: {log: [1e-4, 1e-2]}, trials: 5, on: validation}
"""


def outline(text):
    return Outline.from_yaml(text)


def toy(**parts):
    return Outline.of({"task": {"name": "toy"}, **parts})


def refused(grid):
    with pytest.raises(GridError) as caught:
        cells(grid if isinstance(grid, Outline) else outline(grid))
    return str(caught.value)


def test_the_example_of_the_docs_is_45_cells_of_8_seeds_and_5_trials():
    grid = outline(EXAMPLE)
    found = cells(grid)
    assert len(found) == 3 * 5 * 3
    assert grid.seeds == tuple(range(8))
    assert [point["lr"] for point in found[0].points()] == [0.0001, 0.000316228, 0.001, 0.00316228, 0.01]
    cell = next(cell for cell in found if cell.name == "SORA(PreDiag(FLoRA(r=3)))")
    assert (cell.generator, cell.wrapper, cell.panel) == ("FLoRA", "SORA(PreDiag)", "r=3")
    assert cell.task.width == 7


def test_a_grid_survives_json():
    grid = outline(EXAMPLE)
    assert Outline.model_validate_json(grid.model_dump_json()) == grid


def test_yaml_reads_on_as_a_word_and_1e_4_as_a_number():
    assert read_yaml("{on: no, a: 1e-4, b: -2.5E+3, c: true, d: 7, e: '1e-4'}") == {
        "on": "no", "a": 1e-4, "b": -2500.0, "c": True, "d": 7, "e": "1e-4",
    }  # fmt: skip


def test_yaml_never_builds_objects():
    with pytest.raises(GridError, match="not valid YAML"):
        read_yaml("task: !!python/object/apply:os.system ['true']")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: {name: a}\ntask: {name: b}", "'task' comes twice"),
        ("- a", "holds a list"),
        ("", "holds nothing"),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_is_no_mapping_is_refused(text, message):
    with pytest.raises(GridError, match=message):
        read_yaml(text)


@pytest.mark.parametrize(
    ("grid", "messages"),
    [
        ("task: {name: toy}\ngird: {spec: [a]}", ["unknown field 'gird'", "did you mean 'grid'?", "grid is missing"]),
        ("task: {name: toy}\ngrid: {spec: []}", ["grid.0.spec: this axis is empty"]),
        ("task: {name: toy}\ngrid: {spec: [LoRA()], r: []}", ["axis 'r' is empty"]),
        ("task: {name: toy}\ngrid: {spec: [LoRA()], r: [1, 1]}", ["axis 'r' has a value twice"]),
        ("task: {name: toy}\ngrid: {spec: [LoRA()], seed: 8}", ["write {count: 8} or [8]"]),
        ("task: {name: toy}\ngrid: {spec: [LoRA()], seed: [1, 1]}", ["different"]),
        ("task: {name: toy}\ngrid: {spec: [LoRA()], seed: {count: 0}}", ["greater than or equal to 1"]),
        ("task: {name: toy}\ngrid: {spec: [LoRA()], wrap: [MAP]}", ["'MAP' must hold {spec} once"]),
        ("task: {name: toy}\ngrid: {spec: [LoRA(), LoRA()]}", ["'LoRA()' comes twice"]),
        ("task: {name: toy}\ngrid: {spec: [LoRA()]}\ntune: {lr: {log: [1e-2, 1e-4]}, trials: 3}", ["is no range"]),
        ("task: {name: toy}\ngrid: {spec: [LoRA()]}\ntune: {lr: {log: [0, 1e-4]}, trials: 3}", ["above zero"]),
        ("task: {name: toy}\ngrid: {spec: [LoRA()]}\ntune: {lr: {log: [1e-4, 1e-2]}}", ["say how many trials"]),
        ("task: {name: toy}\ngrid: {spec: [LoRA()]}\ntune: {lr: [1e-3, 1e-2], trials: 3}", ["make 2 points"]),
        ("task: {name: toy}\ngrid: {spec: [LoRA()]}\ntune: {lr: [1e-3], on: test}", ["tune.on", "'validation'"]),
        ("task: {name: toy}\ngrid: {spec: [LoRA()], seed: [1000]}\ntune: {lr: [1e-3]}", ["[1000] are reported too"]),
        ("task: {name: toy}\ngrid: [{spec: [LoRA()], seed: [1]}, {spec: [Full()], seed: [2]}]", ["the same seeds"]),
        ("task: {name: toy}\ngrid: {spec: [LoRA()]}\nreferences: [{spce: Full()}]", ["did you mean 'spec'?"]),
    ],
)
def test_a_grid_that_can_not_be_read_says_everything_that_is_wrong(grid, messages):
    with pytest.raises(GridError) as caught:
        outline(grid)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("grid", "messages"),
    [
        ("task: {name: digts}\ngrid: {spec: [LoRA()]}", ["unknown task 'digts'", "did you mean 'digits'?"]),
        ("task: {}\ngrid: {spec: [LoRA()]}", ["a task needs a name", "toy"]),
        ("task: {name: toy, widht: 3}\ngrid: {spec: [LoRA()]}", ["no option 'widht'", "did you mean 'width'?"]),
        ("task: {name: toy, steps: 0, lr: -1}\ngrid: {spec: [LoRA()]}", ["steps = 0", "lr = -1"]),
        ("task: {name: toy}\ngrid: {spec: ['LoRA(r={r})'], rr: [1]}", ["axis 'rr'", "{r} stands in a template"]),
        ("task: {name: toy, width: 4}\ngrid: {spec: [LoRA()], width: [1]}", ["'width' is set both"]),
        ("task: {name: toy}\ngrid: {spec: ['LoRA(r=2)', 'LoRAA(r=2)', 'LoRA(s=2)']}", ["LoRAA", "did you mean", "'s'"]),
        ("task: {name: toy}\ngrid: {spec: ['LoRA(r=2)', 'LoRA(r=02.0)']}", ["LoRA(r=02.0)"]),
        ("task: {name: toy}\ngrid: {spec: {a: 'LoRA(r=2)', b: 'LoRA(r=2, alpha=2)'}}", ["LoRA(r=2)"]),
        ("task: {name: toy}\ngrid: {spec: [LoRA()]}\ntune: {lrr: [1e-3]}", ["no option 'lrr'", "did you mean 'lr'?"]),
        ("task: {name: toy}\ngrid: {spec: [LoRA()], lr: [1e-3]}\ntune: {lr: [1e-3]}", ["'lr' is an axis of the grid"]),
        ("task: {name: toy}\ngrid: {spec: [LoRA()]}\ntune: {lr: [-1.0]}", ["lr = -1.0"]),
        (
            "task: {name: toy}\ngrid: {spec: [LoRA()]}\ntune: {lr: [1e-3, 1e-2]}\n"
            "references: [{spec: None, tune: {lr: [1.0]}}]",
            ["its search has 1 runs and the grid's 2"],
        ),
        ("task: {name: toy}\ngrid: {spec: [LoRA()]}\nreferences: ['LoRA(r={r})']", ["references take no axes"]),
        (
            "task: {name: toy}\ngrid: [{spec: ['LoRA(r=2)']}, {spec: ['LoRA(r=2, alpha=9)']}]",
            ["2 different cells are called that", "mapping from labels"],
        ),
        ("task: {name: toy}\ngrid: [{spec: ['LoRA(r=2)']}, {spec: ['LoRA(r=2)']}]", ["write it once"]),
    ],
)
def test_cells_that_can_not_work_are_named(grid, messages):
    message = refused(grid)
    for part in messages:
        assert part in message


def test_an_axis_that_a_cell_does_not_use_does_not_multiply_it():
    found = cells(toy(grid={"spec": ["LoRA(r={r})", "Full()"], "r": [1, 2]}))
    assert [(cell.name, cell.panel) for cell in found] == [("LoRA(r=1)", "r=1"), ("LoRA(r=2)", "r=2"), ("Full()", "")]


def test_an_option_of_the_task_is_an_axis_for_references_too():
    found = cells(toy(grid={"spec": ["LoRA(r=2)"], "width": [4, 6]}, references=["None", "Full()"]))
    assert [(cell.name, cell.reference, cell.task.width) for cell in found] == [
        ("None [width=4]", True, 4), ("None [width=6]", True, 6), ("Full() [width=4]", True, 4),
        ("Full() [width=6]", True, 6), ("LoRA(r=2) [width=4]", False, 4), ("LoRA(r=2) [width=6]", False, 6),
    ]  # fmt: skip
    assert {cell.panel for cell in found} == {"width=4", "width=6"}


def test_a_union_of_products_couples_values():
    grid = toy(
        grid=[
            {"spec": {"LoRA": "LoRA(r={r}, alpha=32)"}, "r": [1, 3]},
            {"spec": {"LoRA": "LoRA(r={r}, alpha=64)"}, "r": [2]},
        ]
    )
    assert {(cell.generator, cell.panel): cell.spec.alpha for cell in cells(grid)} == {
        ("LoRA", "r=1"): 32, ("LoRA", "r=3"): 32, ("LoRA", "r=2"): 64,
    }  # fmt: skip


def test_the_bare_generator_is_called_bare_whatever_its_label():
    found = cells(toy(grid={"spec": ["LoRA(r=2)"], "wrap": {"plain": "{spec}", "m": "MAP({spec})"}}))
    assert [cell.wrapper for cell in found] == ["bare", "m"]


def test_a_search_of_its_own_does_not_change_the_budget():
    grid = toy(
        grid={"spec": ["LoRA(r=2)"]},
        references=[{"spec": "None", "tune": {"lr": {"log": [0.1, 1.0]}, "trials": 2}}],
        tune={"lr": [0.1, 0.2]},
    )
    head, cell = cells(grid)
    assert (head.points(), cell.points()) == ([{"lr": 0.1}, {"lr": 1.0}], [{"lr": 0.1}, {"lr": 0.2}])


def test_every_cell_is_tried_without_values_and_what_fails_is_named():
    good = cells(toy(grid={"spec": ["LoRA(r=2)"], "wrap": ["{spec}", "DoRA({spec})"]}, references=["None"]))
    sizes = check(good)
    assert (sizes["LoRA(r=2)"].adapters, sizes["LoRA(r=2)"].rest) == (2 * (6 + 5), 18)
    assert sizes["DoRA(LoRA(r=2))"].adapters == 2 * (6 + 5) + 5
    assert (sizes["None"].adapters, sizes["None"].rest, sizes["None"].layers) == (0, 18, 0)

    bad = cells(toy(task={"name": "toy", "targets": ["nothing"]}, grid={"spec": ["LoRA(r=2)", "FLoRA(r=2)"]}))
    with pytest.raises(GridError, match=re.compile(r"2 of 2 cells can't work.*LoRA\(r=2\).*nothing", re.DOTALL)):
        check(bad)


def test_several_options_are_spread_so_that_each_part_of_each_range_is_tried():
    points = Tune.model_validate(
        {"lr": {"log": [1e-4, 1e-1]}, "weight_decay": {"linear": [0, 1]}, "trials": 4}
    ).points()
    assert sorted(int(4 * point["weight_decay"]) for point in points) == [0, 1, 2, 3]
    assert sorted(int(point["lr"] / 1e-4 >= limit) for point in points for limit in [10**0.75]) == [0, 1, 1, 1]
    assert (
        points
        == Tune.model_validate({"lr": {"log": [1e-4, 1e-1]}, "weight_decay": {"linear": [0, 1]}, "trials": 4}).points()
    )


def test_lists_of_values_are_combined():
    assert Tune.model_validate({"lr": [1, 2], "steps": [3, 4]}).points() == [
        {"lr": 1, "steps": 3}, {"lr": 1, "steps": 4}, {"lr": 2, "steps": 3}, {"lr": 2, "steps": 4},
    ]  # fmt: skip


def test_the_edge_of_a_search_is_known():
    tune = Tune.model_validate({"lr": {"log": [1e-3, 1e-1]}, "trials": 3})
    assert [tune.edges(point) for point in tune.points()] == [{"lr": "min"}, {}, {"lr": "max"}]


def test_the_best_point_goes_by_the_metric_then_by_the_loss_then_by_order():
    found = [
        {"validation/accuracy": 0.5, "validation/loss": 1.0},
        {"validation/accuracy": 0.9, "validation/loss": 2.0},
        {"validation/accuracy": 0.9, "validation/loss": 1.5},
        {"validation/accuracy": float("nan"), "validation/loss": 0.0},
        None,
    ]
    points = [{}] * len(found)
    assert best(points, found, "accuracy", maximise=True) == 2
    assert best(points, found, "accuracy", maximise=False) == 0
    assert best(points, [None, None], "accuracy", maximise=True) is None


def test_a_required_option_of_the_task_may_be_an_axis(monkeypatch):
    from adapterzoo.ablation.tasks import registry

    class Needy(ablation_toys.Toy):
        name = "needy"
        place: str

    monkeypatch.setitem(registry._TASKS, "needy", Needy)
    grid = Outline.of({"task": {"name": "needy"}, "grid": {"spec": ["LoRA(r=2)"], "place": ["a", "b"]}})
    assert [cell.task.place for cell in cells(grid)] == ["a", "b"]
    assert "place" in refused(Outline.of({"task": {"name": "needy"}, "grid": {"spec": ["LoRA(r=2)"]}}))
