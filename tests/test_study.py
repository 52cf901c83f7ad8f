"""The study's harness, on a random encoder of two layers; its figures; and the page, held to the results."""

import copy
import dataclasses
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.image import imread
from scipy import stats
from transformers import BertConfig, BertModel

from adapterzoo import adapted_layers
from adapterzoo.ablation.minilm import Texts
from studies import page, pictures, ranks, summary, trial, wrappers
from studies.__main__ import main
from studies.arms import (
    ADALOMAP,
    ADALORA,
    ARMS,
    AWARE,
    LORA,
    MAP_LORA,
    PEFTS,
    RATES,
    SEEDS,
    STEPWISE,
    TUNING_SEED,
    Arm,
    Job,
    Settings,
    report_jobs,
    tuning_jobs,
)
from studies.lab import Encoded, Lab
from studies.schedule import Progress, best_rates, run_study
from studies.store import Store
from studies.trial import batches, rate_factor, run

ARM = {arm.name: arm for arm in ARMS}
SETTINGS = Settings(steps=32, batch=4, warmup=3, candidates=4)
WIDTH, INNER, LAYERS = 16, 32, 2


def tiny():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertModel(
            BertConfig(
                vocab_size=40, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
                intermediate_size=INNER, max_position_embeddings=12,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            ),
            add_pooling_layer=False,
        )  # fmt: skip


def encoded(count, key):
    generator = torch.Generator().manual_seed(key)

    def texts(length):
        return Texts(torch.randint(1, 40, (count, length), generator=generator), torch.ones(count, length).long())

    rows = torch.stack([torch.arange(count).roll(-own)[:4] for own in range(count)])
    return Encoded(texts(5), texts(9), torch.arange(count) // 9, rows)


def lab_of(settings=SETTINGS):
    return Lab(tiny, encoded(30, 1), encoded(11, 2), encoded(13, 3), settings, "toy")


def done(name, seed=1, role="report", lr=0.01, settings=SETTINGS):
    return run(Job(ARM[name], lr, seed, role), lab_of(settings))


@pytest.fixture(scope="module")
def allocated():
    return done(ADALOMAP)


@pytest.fixture
def trained_model(monkeypatch):
    """A function that runs an arm and gives back the model, before its ranks are compacted."""
    kept = []
    monkeypatch.setattr(trial, "compaction", lambda model, part: kept.append(model))

    def train(name, **options):
        done(name, **options)
        return adapted_layers(kept[-1])

    return train


# One run


def test_a_run_ends_at_its_budget_and_counts_what_is_left(allocated):
    final = [int(digit) for digit in allocated["ranks"][-1]]
    assert sum(final) == 4 * 6 * LAYERS
    assert len(set(final)) > 1  # chosen, not spread
    assert allocated["ranks"][9] == "8" * 6 * LAYERS
    ends = [4 * (WIDTH + WIDTH), (WIDTH + INNER) * 2]
    assert allocated["parameters_in_training"] == LAYERS * (8 * sum(ends) + 8 * 6 + 2 * 6)
    sizes = [WIDTH + INNER if name.endswith(("intermediate.dense", "output.dense")) and "attention" not in name
             else 2 * WIDTH for name in allocated["layers"]]  # fmt: skip
    assert allocated["parameters"] == sum(rank * (size + 1) + 2 for rank, size in zip(final, sizes, strict=True))
    assert 0 <= allocated["change_by_compaction"] < 1e-5


def test_a_run_says_what_happened_at_every_step(allocated):
    assert len(allocated["loss"]) == len(allocated["ranks"]) == len(allocated["penalty_share"]) == SETTINGS.steps
    before_the_end = allocated["penalty_share"][:12]
    assert all(0 < share < 1 for share in before_the_end)
    assert allocated["accuracy"] == allocated["places"].count(1) / len(allocated["places"])
    assert allocated["mrr"] == pytest.approx(sum(1 / place for place in allocated["places"]) / len(allocated["places"]))
    json.dumps(allocated, allow_nan=False)


def test_a_run_repeats_itself_and_a_seed_changes_it(allocated):
    def outcome(record):
        return {name: value for name, value in record.items() if name not in {"ms_per_step", "run_seconds"}}

    assert outcome(done(ADALOMAP)) == outcome(allocated)
    other = done(ADALOMAP, seed=2)
    assert other["loss"][0] != allocated["loss"][0]


def test_only_a_reported_run_looks_at_the_test_set():
    short = dataclasses.replace(SETTINGS, steps=2)
    assert len(done(LORA, role="report", settings=short)["places"]) == 13
    assert len(done(LORA, role="tune", settings=short)["places"]) == 11


def test_arms_of_one_seed_see_the_same_batches():
    first = {done(name, settings=dataclasses.replace(SETTINGS, steps=1))["loss"][0] for name in (LORA, MAP_LORA)}
    assert len(first) == 1  # before the first step every arm is the base


def test_training_lowers_the_loss():
    losses = done(MAP_LORA, settings=dataclasses.replace(SETTINGS, steps=40), lr=0.03)["loss"]
    assert np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.1


def test_turns_let_the_magnitudes_sleep(trained_model):
    for name, moves in ((STEPWISE, False), (MAP_LORA, True)):
        layers = trained_model(name, settings=dataclasses.replace(SETTINGS, steps=5))
        for layer in layers.values():
            assert (layer.adapter.beta.item() != 1) is moves
            assert layer.adapter.inner.B.any()


def test_scale_aware_steps_are_as_large_as_the_norm_of_the_base(trained_model):
    settings = dataclasses.replace(SETTINGS, steps=1, warmup=1)
    for name, aware in ((AWARE, True), (MAP_LORA, False)):
        for layer in trained_model(name, settings=settings).values():
            norm = layer.weight.norm().item()
            moved = abs(layer.adapter.alpha.item() - norm)
            assert moved == pytest.approx(0.01 * (norm if aware else 1), rel=0.02)


def test_batches_are_of_one_package_and_pass_over_all_before_any_comes_again():
    packages = torch.tensor([0] * 9 + [1] * 3 + [2] * 8)
    settings = dataclasses.replace(SETTINGS, steps=10)
    drawn = list(batches(packages, settings, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in drawn] == [4] * 10
    assert all(len(packages[batch].unique()) == 1 for batch in drawn)
    one_pass = torch.cat(drawn[:4])
    assert len(one_pass.unique()) == 16  # two whole batches of each of the packages that have one
    again = list(batches(packages, settings, torch.Generator().manual_seed(0)))
    assert all(one.equal(other) for one, other in zip(drawn, again, strict=True))
    assert not drawn[0].equal(drawn[4])


def test_the_rate_rises_and_falls_to_zero():
    factors = [rate_factor(step, SETTINGS) for step in range(SETTINGS.steps + 1)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert factors[3] == 1
    assert all(np.diff(factors[3:]) < 0)
    assert factors[-1] == 0


# All runs


def outcome_of(job, score=0.5):
    return {"arm": job.arm.name, "lr": job.lr, "seed": job.seed, "role": job.role, "mrr": score, "accuracy": score,
            "run_seconds": 1.0}  # fmt: skip


TWO = (Arm("one", "LoRA(r=2)", (1, 2), rates=(0.1, 0.2)), Arm("two", "LoRA(r=3)", (1,), rate_of="one"))


def study(store, work, arms=TWO, settings=SETTINGS):
    lines = []
    with ThreadPoolExecutor(2) as executor:
        outcomes, progress = run_study(arms, settings, "toy", Store(store), executor, lines.append, work)
    return outcomes, progress, lines


def test_a_study_tunes_reports_and_skips_what_is_done(tmp_path):
    calls = []

    def work(job, settings):
        calls.append(job)
        return outcome_of(job, score=job.lr)

    outcomes, progress, lines = study(tmp_path, work)
    assert not progress.failures
    assert progress.skipped == 0
    assert [(o["arm"], o["lr"], o["seed"], o["role"]) for o in outcomes] == [
        ("one", 0.1, TUNING_SEED, "tune"), ("one", 0.2, TUNING_SEED, "tune"),
        ("one", 0.2, 1, "report"), ("two", 0.2, 1, "report"), ("one", 0.2, 2, "report"),
    ]  # fmt: skip
    assert len(calls) == len(lines) == 5
    assert "[5/5]" in lines[-1]
    again, progress, _ = study(tmp_path, work)
    assert again == outcomes
    assert progress.skipped == len(calls) == 5
    (tmp_path / f"{calls[-1].key}.json").unlink()
    assert study(tmp_path, work)[0] == outcomes
    assert len(calls) == 6
    study(tmp_path, work, settings=dataclasses.replace(SETTINGS, steps=33))
    assert len(calls) == 11  # other settings are other runs


def test_a_failed_run_is_named_and_tried_again(tmp_path):
    def work(job, settings):
        if job.role == "report" and job.seed == 2:
            raise RuntimeError("no")
        return outcome_of(job)

    outcomes, progress, lines = study(tmp_path, work)
    assert len(outcomes) == 4
    assert progress.failures == ["one, learning rate 0.1, seed 2 (report): RuntimeError: no"]
    assert any("failed: one" in line for line in lines)
    assert len(study(tmp_path, lambda job, settings: outcome_of(job))[0]) == 5


def test_the_best_rate_is_by_mrr_and_of_equal_ones_the_lowest():
    job = Job(TWO[0], 0.3, 1, "tune")
    tuned = [outcome_of(dataclasses.replace(job, lr=lr), score) for lr, score in ((0.3, 0.6), (0.1, 0.6), (0.2, 0.5))]
    assert best_rates(tuned) == {"one": 0.1}


def test_progress_counts_what_was_found_but_not_in_its_pace():
    lines = []
    progress = Progress(lines.append, total=4)
    progress._start -= 120
    progress.skip()
    progress.told(Job(TWO[0], 0.1, 1, "report"), outcome_of(Job(TWO[0], 0.1, 1, "report")))
    assert lines[0].startswith("[2/4] one, learning rate 0.1, seed 1 (report): accuracy 50.0 %, MRR 0.500")
    assert lines[0].endswith("about 4 min left")


def test_a_file_that_was_not_finished_is_no_run(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.keep("a", {"seed": (1,)}, {"mrr": 1.0})
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.keep("a", {"seed": (1,)}, {"mrr": 2.0})
    with pytest.raises(KeyboardInterrupt):
        store.keep("b", {"seed": (1,)}, {"mrr": 2.0})
    assert store.find("a", {"seed": (1,)}) == {"mrr": 1.0}
    assert store.find("b", {"seed": (1,)}) is None
    assert store.find("a", {"seed": (2,)}) is None


def test_every_run_has_a_file_of_its_own():
    jobs = tuning_jobs(ARMS) + report_jobs(ARMS, dict.fromkeys(ARM, 0.01))
    assert len({job.key for job in jobs}) == len(jobs) == len({str(job) for job in jobs})


def test_bad_arguments_are_refused(capsys):
    for arguments in (["ranks", "--workers", "0"], ["speed"], []):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    assert "at least one is needed" in capsys.readouterr().err


# Figures


def toy_run(arm, seed, places, final="44", lr=0.01, role="report"):
    return {"arm": arm, "seed": seed, "role": role, "lr": lr, "places": places, "ranks": ["88", final],
            "accuracy": places.count(1) / len(places), "mrr": sum(1 / p for p in places) / len(places),
            "layers": ["encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"],
            "penalty_share": [0.5, 0.25]}  # fmt: skip


TOY = {
    "runs": [
        toy_run("a", 1, [1, 1, 2, 4]), toy_run("a", 2, [1, 1, 1, 2], "35"), toy_run("a", 3, [1, 2, 2, 2]),
        toy_run("b", 1, [2, 1, 2, 4], "53"), toy_run("b", 2, [2, 1, 2, 2], "62"),
        toy_run("a", 100, [1], lr=0.01, role="tune"), toy_run("a", 100, [2], lr=0.03, role="tune"),
    ],
    "zero_shot": {"test": {"places": [2, 1, 2, 2]}},
}  # fmt: skip


def test_a_difference_is_paired_by_seed_and_docstring():
    found = summary.difference(TOY, "a", "b")
    gaps = [0.25, 0.5]
    half = stats.t.ppf(0.975, 1) * np.std(gaps, ddof=1) / math.sqrt(2)
    assert found.seeds == 2
    assert found.accuracy == pytest.approx((0.375, half))
    assert found.mrr[0] == pytest.approx(np.mean([0.5 / 4, (0.5 + 0.5) / 4]))
    each = [1, 0, 0.5, 0]  # of each docstring, over both seeds
    assert found.accuracy_sampling == pytest.approx(1.96 * np.std(each, ddof=1) / 2)
    assert found.mrr_sampling == pytest.approx(1.96 * np.std([0.5, 0, 0.25, 0], ddof=1) / 2)


def test_a_gain_is_over_the_published_encoder():
    each = np.mean([[1, 0, 0, 0], [1, 0, 1, 0], [1, -1, 0, 0]], axis=0)
    assert summary.gain(TOY, "a") == pytest.approx((each.mean(), 1.96 * each.std(ddof=1) / 2))


def test_the_edge_of_the_tried_rates_is_named():
    assert summary.edge(TOY, "a") == "min"
    assert summary.edge(TOY, "b") == ""


def test_agreement_is_spearmans_over_layers():
    runs = summary.reported(TOY, "a")
    assert summary.agreement(runs[2], summary.reported(TOY, "b")[2]) == pytest.approx(-1)
    assert math.isnan(summary.agreement(runs[1], runs[2]))  # equal ranks have no order
    assert summary.moved(TOY, "a", "b") == 2
    assert summary.moved(TOY, "a", "a") == 0


def test_ranks_are_read_by_kind_and_block():
    found = summary.by_kind(TOY, "b")
    assert {kind: values.tolist() for kind, values in found.items()} == {"query": [5.5], "down": [2.5]}
    assert summary.mean_trace(summary.reported(TOY, "b").values()).tolist() == [[8, 8], [5.5, 2.5]]


# The published results


@pytest.fixture(scope="module")
def result():
    return json.loads(page.RESULTS.read_text())


def test_the_tables_of_the_page_are_those_of_the_results(result):
    text = page.PAGE.read_text()
    assert page.filled(text, result) == text
    assert all(f"<!-- table: {name} -->" in text for name in page.TABLES)


def test_the_page_follows_the_results(result):
    other = copy.deepcopy(result)
    changed = next(run for run in other["runs"] if run["arm"] == ADALORA and run["role"] == "report")
    changed["accuracy"] += 0.1
    changed["ranks"][-1] = changed["ranks"][-1][::-1]
    other["runs_of_earlier_starts"] = 3
    text = page.PAGE.read_text()
    before, after = text.splitlines(), page.filled(text, other).splitlines()
    lines = [line for line in after if line not in before]
    assert any(line.startswith("| of these from earlier starts | 3 runs") for line in lines)
    assert any(line.startswith(f"| {ADALORA} | 0.01") for line in lines)  # its accuracy
    assert any(line.startswith(f"| {PEFTS} and {ADALORA}") for line in lines)  # its ranks


def test_every_run_of_the_plan_is_there_at_the_rate_that_was_chosen(result):
    tuned = [run for run in result["runs"] if run["role"] == "tune"]
    jobs = tuning_jobs(ARMS) + report_jobs(ARMS, best_rates(tuned))
    assert [(r["arm"], r["spec"], r["lr"], r["seed"], r["role"]) for r in result["runs"]] == [
        (job.arm.name, job.arm.spec, job.lr, job.seed, job.role) for job in jobs
    ]
    assert result["settings"] == dataclasses.asdict(Settings())
    assert {"cpu", "versions", "commit", "python", "processes"} <= result["machine"].keys()


def test_seeds_and_rates_are_kept_apart(result):
    assert TUNING_SEED not in SEEDS
    assert all(len(arm.rates) == len(RATES) for arm in ARMS)
    for run_ in result["runs"]:
        assert len(run_["places"]) == (500 if run_["role"] == "report" else 300)
        assert run_["accuracy"] == pytest.approx(run_["places"].count(1) / len(run_["places"]))


def test_the_budget_was_met_in_every_published_run(result):
    traces = [summary.trace(run_) for run_ in result["runs"] if run_["ranks"]]
    assert len(traces) == 3 * 4 + 2 * 5 + 3 * 3  # tuning runs, and reported ones
    for trace in traces:
        assert trace.shape == (70, 36)
        assert (trace[:10] == 8).all()
        assert trace[-1].sum() == trace[49].sum() == 4 * 36
        assert (np.diff(trace.sum(axis=1)) <= 0).all()


def test_the_pictures_show_the_results(result, tmp_path):
    pictures.draw_all(result, tmp_path)
    drawn = sorted(tmp_path.glob("*.png"))
    assert [path.name for path in drawn] == [
        "study_differences.png", "study_final_ranks.png", "study_ranks_over_steps.png",
    ]  # fmt: skip
    for path in drawn:
        assert (page.IMAGES / path.name).exists()
        assert f"images/{path.name}" in page.PAGE.read_text()
        shades = imread(path)[..., :3].mean(axis=2)
        assert shades.std() > 0.05
        assert min(shades.shape) > 400


def test_a_result_is_written_and_read_back(tmp_path, result):
    path = tmp_path / "new" / "ranks.json"
    ranks.save(result, path)
    assert json.loads(path.read_text()) == result
    assert path.read_text() == page.RESULTS.read_text()


# The study of wrappers


def test_the_tables_of_the_wrapper_study_are_those_of_its_report():
    text = wrappers.PAGE.read_text()
    assert wrappers.filled(text) == text
    assert {"primary", "secondary", "cells", "cost"} == set(re.findall(r"<!-- table: (\w+) -->", text))


def test_another_report_makes_other_tables(tmp_path):
    for name in ("effects", "cells"):
        table = pd.read_parquet(wrappers.DATA / f"{name}.parquet")
        table.assign(difference=0.5, mean=0.25).to_parquet(tmp_path / f"{name}.parquet")
    for name in ("runs", "environments"):
        (tmp_path / f"{name}.csv").write_bytes((wrappers.DATA / f"{name}.csv").read_bytes())
    text = wrappers.PAGE.read_text()
    assert "+50.0" in wrappers.filled(text, tmp_path)
    assert "+50.0" not in text


def test_what_the_wrapper_study_says_in_words_is_what_it_found():
    rows = {row["wrapper"]: row for row in pd.read_parquet(wrappers.DATA / "effects.parquet").to_dict("records")
            if row["family"] == "primary"}  # fmt: skip
    found = rows["MAP"]
    said = f"+{100 * found['difference']:.1f} points of MRR over the bare generators"
    assert said in wrappers.PAGE.read_text()
    assert f"p = {found['p_adjusted']:.3f} after correction for four tests" in wrappers.PAGE.read_text()
    assert [name for name, row in rows.items() if row["star"]] == ["MAP"]
    for name in ("DoRA", "PreDiag", "SORA(PreDiag)"):
        assert rows[name]["low"] < 0 < rows[name]["high"]
