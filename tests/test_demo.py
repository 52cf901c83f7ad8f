import dataclasses
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch
from rich.console import Console

from adapterzoo import adapted_layers
from adapterzoo.ablation import demo, figures, schedule, trial
from adapterzoo.ablation.cells import FROZEN_RATES, RATES, Cell, all_cells
from adapterzoo.ablation.digits import TEST, TRAIN, VALIDATION, new_digits, old_digits, split
from adapterzoo.ablation.report import cell_table, percent
from adapterzoo.ablation.schedule import Job, curves_frame, report_jobs, results_frame, run_jobs, tuning_jobs
from adapterzoo.ablation.summary import best_rates, summarise, t_interval
from adapterzoo.ablation.transformer import BLOCKS, WIDTH, batches, new_model, pretrain, weights
from adapterzoo.ablation.trial import Point, Record, prepare, run, trainable

CELLS = all_cells()
BASE = weights(new_model(seed=0).backbone)  # not pretrained: what is tested here does not need it
RECORD = Record(0.5, 1.0, None, 0, 325, 1.0, (Point(15, 1.0, 0.5),))

# Every linear layer below the head, [out, in].
SHAPES = [(WIDTH, 4)] + BLOCKS * (4 * [(WIDTH, WIDTH)] + [(2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH)])


# The data


def test_no_image_is_in_two_sets():
    for seed in range(5):
        part = split(seed)
        sizes = [len(part.train), len(part.validation), len(part.test)]
        assert sizes == [TRAIN, VALIDATION, TEST]
        assert len(set(torch.cat([part.train, part.validation, part.test]).tolist())) == sum(sizes)


def test_no_image_is_in_the_data_twice():
    # Were it, indices that differ would not keep the sets apart.
    pixels = torch.cat([old_digits().pixels, new_digits().pixels]).flatten(1)
    assert len(pixels.unique(dim=0)) == len(pixels) == 1797


def test_the_test_set_is_the_same_for_every_seed_and_the_training_set_is_not():
    assert all(split(seed).test.equal(split(0).test) for seed in range(1, 5))
    assert not split(1).train.equal(split(2).train)


def test_a_split_is_stable():
    # Literal: a change of the draws changes every published number.
    assert split(1).test[:4].tolist() == [665, 549, 168, 708]
    assert split(1).train[:4].tolist() == [427, 392, 567, 546]


def test_batches_pass_over_every_image_before_any_comes_again():
    images = new_digits().pick(split(0).train)
    tagged = dataclasses.replace(images, labels=torch.arange(len(images)))
    seen = [batch.labels for batch in batches(tagged, 50, 6, torch.Generator().manual_seed(0))]
    assert [len(batch) for batch in seen] == 6 * [50]
    assert sorted(torch.cat(seen[:4]).tolist()) == list(range(200))


# The base


def test_pretraining_repeats_itself_and_learns():
    one, two = pretrain(steps=20), pretrain(steps=20)
    assert all((one[name] == two[name]).all() for name in BASE)
    assert not any((one[name] == BASE[name]).all() for name in BASE)


def test_weights_are_a_copy():
    model = new_model(seed=0)
    kept = weights(model.backbone)
    with torch.no_grad():
        model.backbone.embed.weight.zero_()
    assert kept["embed.weight"].any()


# Pairing


def test_cells_of_one_seed_start_from_the_same_head_base_and_generator():
    bare, wrapped = prepare("LoRA(r=2)", 7, BASE), prepare("SORA(PreDiag(LoRA(r=2)), rank=2)", 7, BASE)
    assert bare.head.weight.equal(wrapped.head.weight)
    pairs = list(zip(adapted_layers(bare).values(), adapted_layers(wrapped).values(), strict=True))
    assert len(pairs) == len(SHAPES)
    for left, right in pairs:
        assert left.weight.equal(right.weight)
        assert left.adapter.get_parameter("A").equal(right.adapter.get_parameter("inner.inner.A"))


def test_another_seed_draws_another_head_and_generator():
    one, other = prepare("LoRA(r=2)", 7, BASE), prepare("LoRA(r=2)", 8, BASE)
    assert not one.head.weight.equal(other.head.weight)
    layers = zip(adapted_layers(one).values(), adapted_layers(other).values(), strict=True)
    assert not any(a.adapter.get_parameter("A").equal(b.adapter.get_parameter("A")) for a, b in layers)


def test_cells_of_one_seed_see_the_same_batches(monkeypatch):
    seen, descend = [], trial.descend
    monkeypatch.setattr(
        trial, "descend", lambda model, images, *rest: seen.append(images) or descend(model, images, *rest)
    )
    run(None, 1e-2, 3, BASE, test=False, steps=4)
    run("MAP(FLoRA(r=2))", 1e-2, 3, BASE, test=False, steps=4)
    assert len(seen) == 8
    assert all(a.pixels.equal(b.pixels) for a, b in zip(seen[:4], seen[4:], strict=True))


def test_a_run_repeats_itself():
    one, two = (run("MAP(FLoRA(r=2))", 1e-2, 3, BASE, test=True, steps=15) for _ in range(2))
    assert dataclasses.replace(one, ms_per_step=0) == dataclasses.replace(two, ms_per_step=0)


# One run


def test_there_are_17_cells_and_51_runs_of_either_role():
    assert len(CELLS) == len({cell.name for cell in CELLS}) == 17
    tuning = tuning_jobs(CELLS)
    assert len(tuning) == len(set(tuning)) == 51
    reported = report_jobs(CELLS, dict.fromkeys(tuning, RECORD))
    assert len(reported) == 51
    assert not {job.seed for job in tuning} & {job.seed for job in reported}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_every_cell_trains(cell):
    record = run(cell.spec, cell.rates[0], 1, BASE, test=True, steps=5)
    assert math.isfinite(record.val_loss)
    assert 0 <= record.val_accuracy <= 1
    assert 0 <= record.test_accuracy <= 1
    assert record.adapter_parameters == sum(parameters_of(cell, *shape) for shape in SHAPES)
    assert record.head_parameters == 5 * WIDTH + 5


def parameters_of(cell: Cell, rows: int, columns: int) -> int:
    """By hand, for r = 2 and a rotation of rank 2."""
    thin = 2 * (rows + columns)
    generator = {"Frozen": 0, "Full": rows * columns, "LoRA": thin, "AdaLoRA": thin + 2, "FLoRA": thin + 4}
    wrapper = {"bare": 0, "MAP": 2, "DoRA": rows, "PreDiag": rows, "SORA(PreDiag)": rows + 4 * rows}
    return generator[cell.generator] + wrapper[cell.wrapper]


@pytest.mark.parametrize("spec", [None, "LoRA(r=2)"])
def test_only_what_should_train_changes(monkeypatch, spec):
    kept = []
    monkeypatch.setattr(trial, "prepare", lambda *args: kept.append(prepare(*args)) or kept[-1])
    run(spec, 1e-2, 1, BASE, test=False, steps=5)
    after, start = kept[0].state_dict(), prepare(spec, 1, BASE).state_dict()
    changed = {name for name in start if not after[name].equal(start[name])}
    adapters = {name for name in start if ".adapter." in name}
    assert changed == {"head.weight", "head.bias"} | adapters
    assert bool(adapters) == (spec is not None)
    # And the base stays the one that was given, for it is used again.
    assert all(after[f"backbone.{name}"].equal(torch.from_numpy(value)) for name, value in BASE.items())


def test_the_frozen_cell_trains_the_head_alone():
    model = prepare(None, 1, BASE)
    assert (trainable(model.backbone), trainable(model.head)) == (0, 5 * WIDTH + 5)


def test_a_tuning_run_never_looks_at_the_test_set(monkeypatch):
    looked = []
    score = trial.score
    monkeypatch.setattr(trial, "score", lambda model, images: looked.append(images) or score(model, images))
    job = Job(CELLS[2], 1e-2, 1, "tune")
    monkeypatch.setattr(schedule, "run", lambda *args, **kwargs: run(*args, **kwargs, steps=3))
    assert schedule.work(job, BASE).test_accuracy is None
    assert schedule.work(dataclasses.replace(job, role="report"), BASE).test_accuracy is not None
    test = new_digits().pick(split(1).test)
    assert [len(images) == TEST and images.pixels.equal(test.pixels) for images in looked] == [False, False, True]


# Statistics


def test_t_interval_by_hand():
    # n = 3, standard deviation 1, t(0.975; 2 degrees of freedom) = 4.302653: 4.302653 / √3.
    mean, half = t_interval([1.0, 2.0, 3.0])
    assert mean == pytest.approx(2.0)
    assert half == pytest.approx(2.484138, abs=1e-6)


def test_one_value_has_no_interval():
    mean, half = t_interval([0.5])
    assert mean == 0.5
    assert math.isnan(half)
    assert percent(mean, half) == "50.0 ± ?"


def results() -> pd.DataFrame:
    """Two cells by hand. The tuning runs carry a test accuracy that no summary may use."""
    rows = []
    for wrapper, best, tests in (("bare", 0.01, (0.80, 0.82, 0.84)), ("DoRA", 0.03, (0.81, 0.84, 0.87))):
        cell = {"cell": f"{wrapper} LoRA", "generator": "LoRA", "wrapper": wrapper, "spec": ""}
        common = {"val_loss": 1.0, "adapter_parameters": 10, "head_parameters": 5}
        for lr in RATES:
            tune = {"role": "tune", "seed": 100, "val_accuracy": 0.9 if lr == best else 0.5, "ms_per_step": 99.0}
            rows.append({**cell, **common, **tune, "lr": lr, "test_accuracy": 0.1})
        for seed, (test, ms) in enumerate(zip(tests, (1.0, 2.0, 9.0), strict=True)):
            reported = {"role": "report", "seed": seed, "val_accuracy": 0.7, "ms_per_step": ms}
            rows.append({**cell, **common, **reported, "lr": best, "test_accuracy": test})
    return pd.DataFrame(rows)


def test_summary_by_hand():
    bare, dora = summarise(results().sample(frac=1, random_state=0).sort_values("cell", ascending=False)).to_dict(
        "records"
    )
    assert (bare["cell"], dora["cell"]) == ("bare LoRA", "DoRA LoRA")
    assert (bare["lr"], bare["lr_edge"], dora["lr"], dora["lr_edge"]) == (0.01, "", 0.03, "max")
    assert (bare["seeds"], bare["ms_per_step"]) == (3, 2.0)
    assert bare["test_accuracy"] == pytest.approx(0.82)
    assert bare["test_accuracy_half_width"] == pytest.approx(2.484138 * 0.02)
    assert math.isnan(bare["gain_over_bare"])
    # Paired: 0.01, 0.02, 0.03.
    assert dora["gain_over_bare"] == pytest.approx(0.02)
    assert dora["gain_half_width"] == pytest.approx(2.484138 * 0.01)


def test_a_missing_seed_is_left_out_of_the_pairs():
    frame = results()
    frame = frame[~((frame["wrapper"] == "bare") & (frame["seed"] == 2))]
    dora = summarise(frame).iloc[1]
    assert dora["seeds"] == 3
    assert dora["gain_over_bare"] == pytest.approx(0.015)


def test_the_smallest_rate_is_flagged_as_well():
    frame = results()
    frame.loc[frame["role"] == "report", "lr"] = min(RATES)
    assert summarise(frame)["lr_edge"].tolist() == ["min", "min"]


def test_a_rate_is_chosen_by_validation_accuracy_and_then_by_validation_loss():
    frame = pd.DataFrame(
        [
            ("a", "tune", 1.0, 0.8, 0.5), ("a", "tune", 2.0, 0.9, 0.7), ("a", "tune", 3.0, 0.9, 0.6),
            ("a", "report", 9.0, 1.0, 0.0), ("b", "tune", 1.0, 0.2, math.nan), ("b", "tune", 2.0, 0.2, 9.0),
        ],
        columns=["cell", "role", "lr", "val_accuracy", "val_loss"],
    )  # fmt: skip
    assert best_rates(frame) == {"a": 3.0, "b": 2.0}


# Schedule and output


def some_runs(job, base):
    """What no run gave: enough to draw every picture."""
    shift = 0.01 * job.seed + (0.1 if job.lr in (RATES[1], FROZEN_RATES[1]) else 0)
    return dataclasses.replace(
        RECORD, val_accuracy=0.5 + shift, test_accuracy=0.6 + shift if job.role == "report" else None
    )


def test_a_failing_run_is_told_and_the_others_finish():
    def work(job, base):
        if job.cell.name == "Full()":
            raise RuntimeError("no luck")
        return some_runs(job, base)

    told = []
    with ThreadPoolExecutor(2) as executor:
        done = run_jobs(executor, work, tuning_jobs(CELLS), BASE, lambda job, outcome: told.append((job, outcome)))
    assert len(told) == 51
    failed = [job for job, outcome in told if isinstance(outcome, RuntimeError)]
    assert {job.cell.name for job in failed} == {"Full()"}
    assert list(done) == [job for job in tuning_jobs(CELLS) if job not in failed]
    assert {job.cell.name for job in report_jobs(CELLS, done)} == {cell.name for cell in CELLS} - {"Full()"}


def finished() -> dict[Job, Record]:
    tuned = {job: some_runs(job, BASE) for job in tuning_jobs(CELLS)}
    return tuned | {job: some_runs(job, BASE) for job in report_jobs(CELLS, tuned)}


def test_every_cell_is_in_the_table():
    console = Console(width=100)
    with console.capture() as capture:
        console.print(cell_table(summarise(results_frame(finished()))))
    lines = capture.get().splitlines()
    assert all(any(cell.generator in line and cell.wrapper in line for line in lines) for cell in CELLS)
    assert all(len(line) <= 100 for line in lines)


def test_tuning_runs_are_in_the_results_without_a_test_accuracy():
    frame = results_frame(finished())
    assert len(frame) == 102
    assert frame.loc[frame["role"] == "tune", "test_accuracy"].isna().all()
    assert frame.loc[frame["role"] == "report", "test_accuracy"].notna().all()


def test_pictures_are_drawn_with_a_cell_and_a_reference_missing(tmp_path):
    done = {job: record for job, record in finished().items() if job.cell.name not in ("Full()", "DoRA(LoRA(r=2))")}
    figures.heatmap(summarise(results_frame(done)), tmp_path / "heatmap.png")
    figures.curves(curves_frame(done), tmp_path / "curves.png")
    assert (tmp_path / "heatmap.png").stat().st_size > 10_000
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(("failures", "status"), [([], 0), (["LoRA(r=2): no luck"], 1)])
def test_main_writes_its_files_and_fails_if_a_run_failed(monkeypatch, tmp_path, capsys, failures, status):
    monkeypatch.setattr(demo, "run_all", lambda *args: (finished(), failures))
    assert demo.main(["--out", str(tmp_path / "new" / "folder")]) == status
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == set(demo.FILES)
    assert all(failure in capsys.readouterr().out for failure in failures)


def test_files_of_an_earlier_run_are_not_mixed_with_those_of_a_failed_one(monkeypatch, tmp_path):
    (tmp_path / "summary.csv").write_text("old")
    (tmp_path / "notes.txt").write_text("not ours")
    tuned = dict(itertools.islice(finished().items(), 51))
    monkeypatch.setattr(demo, "run_all", lambda *args: (tuned, ["everything after tuning"]))
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "notes.txt"}


def test_a_folder_that_is_a_file_is_refused_before_any_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "run_all", lambda *args: pytest.fail("worked first"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit_:
        demo.main(["--out", str(tmp_path / "file")])
    assert exit_.value.code == 2
    assert "file: it can't be written to (" in capsys.readouterr().err
