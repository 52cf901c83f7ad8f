"""Statistics of reports: held to brute force, to simulation, and to what the page of statistics says of them."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from adapterzoo.ablation.reports.by_example import Examples
from adapterzoo.ablation.reports.cells import cells, direction
from adapterzoo.ablation.reports.effects import effects
from adapterzoo.ablation.reports.fronts import fronts
from adapterzoo.ablation.reports.pairs import by_cell, by_wrapper, reported
from adapterzoo.ablation.reports.results import read
from adapterzoo.ablation.reports.statistics import (
    all_equal,
    bca_interval,
    benjamini_hochberg,
    effect_size,
    front,
    holm,
    interval,
    needed_pairs,
    sign_flip,
    t_interval,
    too_small,
)
from adapterzoo.errors import RunsError
from tests.ablation_runs import write_runs

REPEATS = 4000
WHOLE = st.lists(st.integers(-4, 4), min_size=1, max_size=9)
LAWS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "heavy tails": lambda rng, shape: rng.standard_t(5, shape),
    "accuracies on 300 examples": lambda rng, shape: (
        (rng.binomial(300, 0.9, shape) - rng.binomial(300, 0.9, shape)) / 300
    ),
}


def covers(low, high):
    """The share of intervals that hold zero, the mean of every law."""
    return np.mean((np.asarray(low) <= 0) & (np.asarray(high) >= 0))


@pytest.mark.parametrize("law", LAWS)
def test_the_t_interval_of_six_seeds_covers_93_percent_and_bca_three_points_less(law):
    draws = LAWS[law](np.random.default_rng(0), (REPEATS, 6))
    found = [interval(draw) for draw in draws]
    assert {one.method for one in found} == {"t"}
    share = covers([one.low for one in found], [one.high for one in found])
    assert share >= 0.93
    bca = stats.bootstrap(
        (draws[:1000],), np.mean, axis=-1, vectorized=True, n_resamples=999, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    assert covers(bca.low, bca.high) < share - 0.03
    if law == "normal":
        assert 0.84 < covers(bca.low, bca.high) < 0.88  # the 86 % that the page names


def test_of_skewed_differences_six_seeds_cover_less_as_the_page_says():
    draws = np.random.default_rng(0).exponential(size=(REPEATS, 6)) - 1
    found = [t_interval(draw) for draw in draws]
    assert 0.87 < covers([one.low for one in found], [one.high for one in found]) < 0.92


def test_from_20_values_on_the_interval_is_bca_and_covers_a_skewed_mean_from_both_sides_better_than_t():
    draws = np.random.default_rng(0).exponential(size=(300, 40)) - 1
    found = [interval(draw) for draw in draws]
    assert {one.method for one in found} == {"BCa"}
    assert interval(draws[0][:20]).method == "BCa"
    assert interval(draws[0][:19]).method == "t"
    assert covers([one.low for one in found], [one.high for one in found]) >= 0.90
    too_low, t_too_low = (np.mean([one.high < 0 for one in kind]) for kind in (found, [t_interval(d) for d in draws]))
    assert too_low < t_too_low


def test_the_t_interval_is_scipys():
    values = [0.1, 0.4, 0.35, 0.8]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = interval(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(np.mean(values))


def test_bca_of_one_sample_is_scipys_and_the_same_at_every_call():
    values = np.random.default_rng(3).normal(size=25)
    expected = stats.bootstrap((values,), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(9))
    found = bca_interval([values])
    width = found.high - found.low
    assert abs(found.low - expected.confidence_interval.low) < 0.03 * width
    assert abs(found.high - expected.confidence_interval.high) < 0.03 * width
    assert bca_interval([values]) == found


def test_bca_of_strata_weighs_their_means_and_is_wide_by_their_own_spreads():
    rng = np.random.default_rng(0)
    wide, narrow = rng.normal(0, 3, 400), rng.normal(10, 1, 400)
    found = bca_interval([wide, narrow], [0.25, 0.75])
    assert found.mean == pytest.approx(0.25 * wide.mean() + 0.75 * narrow.mean())
    error = math.sqrt((0.25 * wide.std() / 20) ** 2 + (0.75 * narrow.std() / 20) ** 2)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)


@pytest.mark.parametrize(("values", "n"), [([], 0), ([0.5], 1)])
def test_below_two_values_there_is_a_mean_and_no_interval(values, n):
    found = interval(values)
    assert math.isnan(found.mean) == (n == 0)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.method == ""


@pytest.mark.parametrize("value", [0.0, 0.3, -0.1])
def test_equal_values_are_said_to_be_and_have_no_other_interval(value):
    found = interval([value] * 8)
    assert (found.mean, found.low, found.high) == pytest.approx((value, value, value))
    assert found.method == "equal"
    assert math.isnan(effect_size([value] * 8))


def test_what_rounding_tells_apart_is_equal_by_the_size_of_the_metric():
    differences = np.array([0.9 - 0.8, 0.4 - 0.3, 0.5 - float(np.float32(0.4))])  # all a tenth, up to rounding
    assert len(set(differences)) == 3
    assert all_equal(differences, 0.9)
    assert interval(differences, 0.9).method == "equal"
    assert all_equal([1e-9, -1e-9], 0.9)
    assert not all_equal([1e-9, -1e-9])  # of a metric that is so small itself
    assert not all_equal([0.1, 0.1001], 0.9)


def brute(differences):
    """The share of all sign patterns with a sum as far from zero as the observed one, in whole numbers."""
    patterns = itertools.product([-1, 1], repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(pattern, differences, strict=True))) for pattern in patterns]
    return sum(one >= abs(sum(differences)) for one in sums) / len(sums)


@given(WHOLE)
def test_the_sign_flip_p_is_that_of_all_patterns(differences):
    assert sign_flip(differences) == brute(differences)


@given(WHOLE)
def test_ties_up_to_rounding_count_in_the_sign_flip_p(differences):
    bare = [(500 + 37 * i, d) for i, d in enumerate(differences)]  # float32 accuracies on 997 examples
    rounded = [float(np.float32((right + d) / 997)) - float(np.float32(right / 997)) for right, d in bare]
    assert sign_flip(rounded, 0.9) == brute(differences)


def test_the_sign_flip_p_is_scipys_where_nothing_ties():
    for n in range(2, 11):
        values = np.random.default_rng(n).normal(0.4, 1, n)
        p = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
        assert sign_flip(values) == pytest.approx(p, abs=1e-12)


def test_scipys_p_is_too_small_where_differences_cancel_which_is_why_ours_is_own():
    values = np.array([0.1, 0.2, -0.3, 0.7 - 0.6, -0.1])  # of sum zero but for rounding: every pattern is as far out
    p = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert p < 1
    assert sign_flip(values) == 1


@pytest.mark.parametrize("n", [20, 33, 40])
def test_many_pairs_have_an_exact_p_too(n):
    for positive in (n // 2, n // 2 + 4, n):
        values = np.repeat([1.0, -1.0], [positive, n - positive])
        assert sign_flip(values) == pytest.approx(stats.binomtest(positive, n).pvalue, rel=1e-9)


def test_more_than_40_pairs_draw_their_patterns():
    values = np.repeat([1.0, -1.0], [38, 22])
    exact = stats.binomtest(38, 60).pvalue
    assert sign_flip(values) == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))
    assert sign_flip(np.ones(60)) == 1 / 10_000


def test_a_sign_flip_p_is_never_below_its_floor_and_is_one_for_nothing():
    assert sign_flip([0.3]) == 1
    assert sign_flip([0.3, 0.2]) == 0.5
    assert sign_flip([0.0] * 8) == 1
    assert sign_flip([0.1] * 8) == 2**-7
    assert math.isnan(sign_flip([]))


def test_holm_is_the_closed_test_of_bonferroni():
    rng = np.random.default_rng(0)
    for _ in range(200):
        p = rng.uniform(size=4) ** 3
        closed = [
            max(
                min(1.0, len(group) * min(p[list(group)]))
                for size in range(1, 5)
                for group in itertools.combinations(range(4), size)
                if i in group
            )
            for i in range(4)
        ]
        assert holm(p) == pytest.approx(closed)


def test_benjamini_hochberg_is_its_definition():
    p = np.random.default_rng(0).uniform(size=12) ** 3
    ranked = np.sort(p)
    expected = [min(min(1.0, 12 * ranked[j] / (j + 1)) for j in range(12) if ranked[j] >= one) for one in p]
    assert benjamini_hochberg(p) == pytest.approx(expected)


@pytest.mark.parametrize("correct", [holm, benjamini_hochberg])
def test_a_test_that_could_not_be_made_still_counts(correct):
    nan = math.nan
    assert correct([0.01, nan, nan, nan])[0] == pytest.approx(0.04)
    assert np.isnan(correct([0.01, nan, nan, nan])[1:]).all()
    assert len(correct([])) == 0


def test_sign_flip_with_holm_calls_a_false_family_at_most_once_in_20():
    rng = np.random.default_rng(0)
    bare = rng.standard_normal((2000, 1, 8))
    families = rng.standard_normal((2000, 4, 8)) - bare  # four wrappers and one bare generator, all alike
    called = np.mean([min(holm(map(sign_flip, family))) <= 0.05 for family in families])
    assert 0.01 < called <= 0.05
    real = np.mean([min(holm(map(sign_flip, family + 2.5))) <= 0.05 for family in families[:200]])
    assert real > 0.9


def test_sign_flip_with_benjamini_hochberg_keeps_the_false_discoveries_down():
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        tests = rng.standard_normal((12, 10))
        tests[:4] += 1.5
        called = benjamini_hochberg(map(sign_flip, tests)) <= 0.05
        shares.append(called[4:].sum() / max(1, called.sum()))
    assert np.mean(shares) <= 0.05


def test_the_pairs_needed_are_the_fewest_that_can_reach_5_percent():
    for m in range(1, 500):
        n = needed_pairs(m)
        assert m * 2 ** (1 - n) <= 0.05 < m * 2 ** (2 - n)
        assert too_small(m, n) is None
        assert holm([sign_flip([1.0] * n)] + [math.nan] * (m - 1))[0] <= 0.05
        assert f"need{'s' if m == 1 else ''} {n} pairs" in too_small(m, n - 1)


def test_too_few_pairs_are_a_sentence():
    assert too_small(4, 6) == (
        "n too small: 4 tests corrected together need 8 pairs, and there are 6 (the smallest p they can reach is 0.12)"
    )
    assert "1 test needs 6 pairs, and there is 1" in too_small(1, 1)
    assert "there are 0 (the smallest p they can reach is 1)" in too_small(2, 0)
    assert too_small(0, 3) is None
    with pytest.raises(ValueError, match="0 tests need no pairs"):
        needed_pairs(0)


def test_the_effect_size_of_few_pairs_is_unbiased():
    rng = np.random.default_rng(0)
    found = np.mean([effect_size(rng.normal(0.5, 1, 6)) for _ in range(8000)])
    assert found == pytest.approx(0.5, abs=0.025)  # without the correction 0.595
    assert effect_size([1, 2, 3, 4, 5, 6]) == pytest.approx(3.5 / math.sqrt(3.5) * 0.840749, rel=1e-5)
    assert math.isnan(effect_size([0.1, 0.2]))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8), st.booleans())
def test_a_front_holds_what_nothing_beats(points, maximise):
    sign = 1 if maximise else -1
    found = front([value for value, _ in points], [cost for _, cost in points], maximise)
    for (value, cost), on in zip(points, found, strict=True):
        beaten = any(
            sign * v >= sign * value and c <= cost and (v != value or c != cost) for v, c in points
        )  # as good in both, and not the same point
        assert on == (not beaten)


def test_what_has_no_value_is_on_no_front_and_beats_nothing():
    assert front([0.9, math.nan, 0.8], [2, 1, 1]).tolist() == [True, False, True]
    assert front([0.9, 0.95], [2, math.nan]).tolist() == [True, False]


# From here on: whole folders of runs.


def gains(cell, seed):
    """A value whose differences are known: MAP gains 1 to 8 hundredths by seed, DoRA loses as much but in AdaLoRA."""
    base = 0.5 + 0.01 * seed + (0.02 if cell["generator"] == "AdaLoRA" else 0.0)
    step = 0.01 * (seed + 1)
    lost = 0.0 if cell["generator"] == "AdaLoRA" else -step
    return base + {"bare": 0.0, "MAP": step, "DoRA": lost}.get(cell["wrapper"], 0.003)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return read(
        write_runs(
            tmp_path_factory.mktemp("known"), value=gains, failed=[("MAP(LoRA(r=2))", 3)], missing=[("FLoRA(r=8)", 5)]
        )
    )


@pytest.fixture(scope="module")
def known_effects(known):
    return effects(known)


def row(table, **where):
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1, where
    return table.iloc[0]


def test_a_single_cell_is_paired_with_its_bare_generator_by_seed(known_effects):
    found = row(known_effects, cell="MAP(AdaLoRA(r=8))")
    steps = 0.01 * np.arange(1, 9)
    assert (found["family"], found["wrapper"], found["generator"], found["panel"]) == (
        "secondary", "MAP", "AdaLoRA", "r=8",
    )  # fmt: skip
    assert found["seeds"] == list(range(8))
    assert found["difference"] == pytest.approx(steps.mean())
    expected = stats.ttest_1samp(steps, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert found["method"] == "t"
    assert found["p"] == 2**-7
    assert found["d_z"] == pytest.approx(effect_size(steps))
    assert found["better"] is True


def test_the_primary_family_is_the_wrappers_averaged_over_generators_and_panels(known_effects):
    table = known_effects
    primary = table[table["family"] == "primary"]
    assert primary["wrapper"].tolist() == ["MAP", "DoRA", "SORA(PreDiag)"]
    assert set(primary["m"]) == {3}
    assert set(primary["correction"]) == {"Holm"}
    assert primary["p_adjusted"].tolist() == pytest.approx(holm(primary["p"]).tolist())
    dora = row(primary, wrapper="DoRA")
    assert dora["cells"] == 6
    kept = 0.01 * (np.array([0, 1, 2, 3, 4, 6, 7]) + 1)  # DoRA loses nothing in one of three generators
    assert dora["difference"] == pytest.approx(-2 / 3 * kept.mean())
    assert dora["better"] is False


def test_the_secondary_family_is_all_cells_under_benjamini_hochberg(known_effects):
    table = known_effects
    secondary = table[table["family"] == "secondary"]
    assert len(secondary) == 18
    assert set(secondary["m"]) == {18}
    assert set(secondary["correction"]) == {"BH"}
    assert secondary["p_adjusted"].tolist() == pytest.approx(benjamini_hochberg(secondary["p"]).tolist())


def test_seeds_that_are_no_pairs_are_named_with_the_reason(known_effects):
    table = known_effects
    single = row(table, cell="MAP(LoRA(r=2))")
    assert single["seeds"] == [0, 1, 2, 4, 5, 6, 7]
    assert "7 of 8 pairs: seed 3 (MAP(LoRA(r=2)) failed)" in single["note"]
    assert "7 of 8 pairs: seed 5 (FLoRA(r=8) has not run)" in row(table, cell="DoRA(FLoRA(r=8))")["note"]
    averaged = row(table, family="primary", wrapper="MAP")
    assert averaged["seeds"] == [0, 1, 2, 4, 6, 7]
    assert "seed 3 (MAP(LoRA(r=2)) failed)" in averaged["note"]
    assert "seed 5 (FLoRA(r=8) has not run)" in averaged["note"]


def test_a_failed_run_does_not_shift_the_pairs(known_effects):
    found = row(known_effects, cell="MAP(LoRA(r=2))")
    assert found["difference"] == pytest.approx(0.01 * np.mean([1, 2, 3, 5, 6, 7, 8]))


def test_no_star_is_shown_where_n_is_too_small(known_effects):
    table = known_effects
    assert table.loc[table["p"] < 0.01, "too_small"].any()
    small = table[table["too_small"]]
    assert not small["star"].any()
    assert small["note"].str.contains("n too small: ").all()
    assert not table.loc[~table["too_small"], "note"].str.contains("too small").any()
    assert (table["too_small"] == (table["m"] * 2.0 ** (1 - table["n"]) > 0.05)).all()


def test_stars_stand_where_the_corrected_p_allows_them(tmp_path):
    results = read(write_runs(tmp_path, value=gains, seeds=10, generators=["LoRA"], axes={"r": [2]}))
    table = effects(results)
    assert table["star"].tolist() == (table["p_adjusted"] <= 0.05).tolist()
    assert row(table, family="primary", wrapper="MAP")["star"]


def test_equal_differences_are_equal_up_to_float32_and_no_number_is_missing(tmp_path):
    def value(cell, seed):
        base = 0.1 * seed + 0.05
        return {"MAP": float(np.float32(base)), "DoRA": base + 0.05}.get(cell["wrapper"], base)

    table = effects(read(write_runs(tmp_path, value=value, examples=0, generators=["LoRA"], rates=[])))
    same, dora = row(table, cell="MAP(LoRA(r=2))"), row(table, cell="DoRA(LoRA(r=2))")
    assert same["method"] == dora["method"] == "equal"
    assert "all 8 differences are equal" in same["note"]
    assert "no d_z: the differences do not vary" in same["note"]
    assert math.isnan(same["d_z"])
    assert (same["difference"], same["low"], same["high"]) == pytest.approx((0, 0, 0), abs=1e-7)
    assert same["difference"] != 0  # the float32 of one of the two
    assert same["p"] == 1
    assert same["better"] is None
    assert (dora["difference"], dora["low"], dora["high"]) == pytest.approx((0.05, 0.05, 0.05))
    assert dora["p"] == 2**-7
    assert dora["better"] is True


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_and_two_seeds_give_what_they_can(tmp_path, seeds):
    found = row(effects(read(write_runs(tmp_path, value=gains, seeds=seeds))), cell="MAP(LoRA(r=2))")
    assert found["difference"] == pytest.approx(0.01 * np.mean(np.arange(seeds) + 1))
    assert found["p"] == 2.0 ** (1 - seeds)
    assert ("one pair has no interval" in found["note"]) == (seeds == 1)
    assert math.isnan(found["low"]) == (seeds == 1)
    assert "no d_z below 3 pairs" in found["note"]
    assert found["too_small"]


def test_twenty_seeds_have_a_bca_interval(tmp_path):
    results = read(write_runs(tmp_path, seeds=20, generators=["LoRA"], axes={"r": [2]}, references=[], rates=[]))
    table = effects(results)
    assert set(table["method"]) == {"BCa"}
    assert (table["low"] < table["difference"]).all()
    assert set(cells(results)["method"]) == {"BCa"}


def test_one_generator_is_its_own_average(tmp_path):
    results = read(write_runs(tmp_path, value=gains, generators=["LoRA"], axes={"r": [2]}, failed=[("LoRA(r=2)", 1)]))
    table = effects(results)
    for wrapper in ("MAP", "DoRA", "SORA(PreDiag)"):
        mean, single = (row(table, family=family, wrapper=wrapper) for family in ("primary", "secondary"))
        assert mean[["n", "difference", "low", "high", "p"]].equals(single[["n", "difference", "low", "high", "p"]])


def test_without_a_bare_generator_nothing_is_tested_and_it_is_said(tmp_path):
    table = effects(read(write_runs(tmp_path, wrappers=["MAP", "DoRA"])))
    assert table["difference"].isna().all()
    assert table["p_adjusted"].isna().all()
    assert not table["star"].any()
    assert (table["m"] == 0).all()
    assert "no bare LoRA to compare MAP(LoRA(r=2)) with" in row(table, cell="MAP(LoRA(r=2))")["note"]


def test_only_bare_generators_have_no_effects(tmp_path):
    results = read(write_runs(tmp_path, wrappers=["bare"]))
    assert effects(results).empty
    assert len(cells(results)) == 8


def test_a_cell_without_any_pair_is_left_out_of_the_average_by_name(tmp_path):
    lost = [("MAP(FLoRA(r=8))", seed) for seed in range(8)]
    table = effects(read(write_runs(tmp_path, value=gains, failed=lost)))
    single, mean = row(table, cell="MAP(FLoRA(r=8))"), row(table, family="primary", wrapper="MAP")
    assert single["n"] == 0
    assert math.isnan(single["difference"])
    assert math.isnan(single["p"])
    assert "0 of 8 pairs: seeds 0 1 2 3 4 5 6 7 (MAP(FLoRA(r=8)) failed)" in single["note"]
    assert single["m"] == 18  # it was planned, so it counts
    assert mean["n"] == 8
    assert mean["cells"] == 5
    assert "left out: MAP(FLoRA(r=8)) has no pair" in mean["note"]


def test_a_metric_that_is_not_finite_is_no_pair(tmp_path):
    value = lambda cell, seed: math.nan if (cell["cell"], seed) == ("MAP(LoRA(r=2))", 2) else gains(cell, seed)  # noqa: E731
    results = read(write_runs(tmp_path, value=value, examples=0))
    found = row(effects(results), cell="MAP(LoRA(r=2))")
    assert found["n"] == 7
    assert "seed 2 (MAP(LoRA(r=2)) has no finite test/accuracy)" in found["note"]
    cell = row(cells(results), cell="MAP(LoRA(r=2))")
    assert (cell["n"], cell["done"]) == (7, 8)
    assert cell["note"] == "1 without a finite test/accuracy"
    assert math.isfinite(cell["mean"])


def test_a_metric_that_is_minimised_is_better_where_it_falls(tmp_path):
    results = read(write_runs(tmp_path, value=gains, metric="perplexity", maximise=False, percent=False))
    table = effects(results)
    assert set(table["metric"]) == {"test/perplexity"}
    assert row(table, cell="MAP(LoRA(r=2))")["better"] is False
    assert row(table, cell="DoRA(LoRA(r=2))")["better"] is True
    found = fronts(results)
    cost = found[(found["cost"] == "adapter_parameters") & found["front"]]
    assert results.runs.loc[results.runs["role"] == "report", "test/perplexity"].min() <= cost["mean"].min()
    assert cost.loc[cost["mean"].idxmin(), "mean"] == found["mean"].min()


def test_other_metrics_are_one_secondary_family_each(known, known_effects):
    table = effects(known, ["test/loss", "ms_per_step", "test/accuracy"])
    for metric in ("test/loss", "ms_per_step"):
        part = table[table["metric"] == metric]
        assert set(part["family"]) == {"secondary"}
        assert set(part["m"]) == {21}
    own = table[table["metric"] == "test/accuracy"].reset_index(drop=True)
    assert own.equals(known_effects)
    loss = row(table, metric="test/loss", cell="MAP(AdaLoRA(r=2))")
    assert loss["difference"] == pytest.approx(-row(own, cell="MAP(AdaLoRA(r=2))")["difference"])
    assert loss["better"] is True
    assert direction(known, "surprise") is None


def test_an_unknown_metric_is_named_with_the_nearest(known):
    with pytest.raises(RunsError, match=r"has 'test/acuracy', 'speed'; its metrics are .*did you mean 'test/accuracy'"):
        effects(known, ["test/acuracy", "speed"])
    with pytest.raises(RunsError, match="did you mean"):
        cells(known, ["ms_per_stp"])


def test_a_cell_has_the_mean_over_its_seeds_and_its_costs(known):
    found = row(cells(known), cell="MAP(LoRA(r=2))")
    values = [gains({"generator": "LoRA", "wrapper": "MAP"}, seed) for seed in (0, 1, 2, 4, 5, 6, 7)]
    assert found["mean"] == pytest.approx(np.mean(values))
    assert (found["low"], found["high"]) == pytest.approx((t_interval(values).low, t_interval(values).high))
    assert found["sd"] == pytest.approx(np.std(values, ddof=1))
    assert (found["planned"], found["done"], found["failed"], found["missing"]) == (8, 7, 1, 0)
    assert found["note"] == "1 of 8 failed"
    assert found["adapter_parameters"] == 1030
    assert found["axis/r"] == 2
    assert row(cells(known), cell="FLoRA(r=8)")["note"] == "1 of 8 missing"


def test_a_chosen_option_at_an_end_of_those_tried_is_marked(known):
    table = cells(known)
    assert set(table.loc[table["option/lr"] == 1e-4, "edge"]) == {"lr lowest"}
    assert set(table.loc[table["option/lr"] == 1e-3, "edge"]) == {""}
    assert set(table.loc[table["option/lr"] == 1e-2, "edge"]) == {"lr highest"}


def test_runs_that_tune_are_in_no_mean(known):
    tuned = known.runs[known.runs["role"] == "tune"]
    assert len(tuned) == 26 * 3
    assert tuned["test/accuracy"].isna().all()
    assert set(cells(known, ["validation/accuracy"])["n"]) == {7, 8}


def test_fronts_never_compare_different_problems(tmp_path):
    easy = lambda cell, seed: 0.9 if cell["axes"].get("dataset") == "easy" else 0.6 + 0.001 * len(cell["wrapper"])  # noqa: E731
    axes = {"dataset": ["easy", "hard"], "r": [2, 4]}
    results = read(write_runs(tmp_path, value=easy, axes=axes, options=["dataset"], references=[], seeds=2))
    found = fronts(results)
    assert set(found["problem"]) == {"dataset=easy", "dataset=hard"}
    hard = found[(found["problem"] == "dataset=hard") & (found["cost"] == "adapter_parameters")]
    assert len(hard) == 24
    assert hard["front"].sum() > 3
    assert set(hard.loc[hard["front"], "panel"]) == {"dataset=hard, r=2"}


def test_references_are_on_fronts_and_in_no_comparison(known, known_effects):
    assert "Full()" in set(fronts(known)["cell"])
    assert not set(known_effects["generator"]) & {"None", "Full"}


def test_a_reference_is_never_the_bare_generator_that_a_wrapper_is_compared_with(tmp_path):
    value = lambda cell, seed: 0.9 if cell["reference"] else gains(cell, seed)  # noqa: E731
    path = write_runs(tmp_path, value=value, generators=["LoRA"], axes={}, references=["LoRA(r=64)"]) / "grid.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "cells": record["cells"][::-1]}))  # references come first or last
    results = read(tmp_path)
    assert set(results.runs.loc[results.runs["wrapper"] == "bare", "generator"]) == {"LoRA"}
    assert row(effects(results), cell="MAP(LoRA())")["difference"] == pytest.approx(0.045)


def over_examples(results, cell):
    runs = reported(results, results.column)
    return Examples(results, runs), row_of(by_cell(results, runs), cell)


def row_of(members, cell):
    return next(pairs for pairs in members if pairs.cell == cell)


def test_the_interval_over_examples_is_that_of_differences_averaged_over_seeds(known, known_effects):
    examples, pairs = over_examples(known, "MAP(LoRA(r=2))")
    found, size, why = examples.interval(pairs)
    runs = known.runs[(known.runs["role"] == "report") & known.runs["seed"].isin(pairs.seeds)]
    ours, bare = (
        np.mean([known.examples(run)["score"] for run in runs.loc[runs["cell"] == cell, "run"]], axis=0)
        for cell in ("MAP(LoRA(r=2))", "LoRA(r=2)")
    )
    assert (size, why, found.method) == (40, "", "BCa")
    expected = bca_interval([ours - bare])
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(pairs.differences.mean())
    shown = row(known_effects, cell="MAP(LoRA(r=2))")
    assert (shown["example_low"], shown["example_high"], shown["example_n"]) == (found.low, found.high, 40)


def test_cells_with_other_examples_are_strata_weighted_by_their_cells(tmp_path):
    def value(cell, seed):
        return gains(cell, seed) + 0.2 * (cell["wrapper"] == "MAP" and cell["axes"].get("dataset") == "c")

    axes = {"dataset": ["a", "b", "c"]}
    write_runs(tmp_path, value=value, axes=axes, options=["dataset"], generators=["LoRA"], references=[], rates=[])
    results = read(tmp_path)
    for run in results.runs.loc[results.runs["panel"] == "dataset=c", "run"]:
        change_examples(tmp_path / run / "examples.npz", lambda columns: columns | {"id": columns["id"] + 1000})
    runs = reported(results, results.column)
    mean = next(pairs for pairs in by_wrapper(by_cell(results, runs)) if pairs.wrapper == "MAP")
    found, size, _ = Examples(results, runs).interval(mean)
    assert size == 80  # a and b share theirs
    assert found.mean == pytest.approx(mean.differences.mean())
    assert found.low < mean.differences.mean() < found.high


FAULTS = {
    "another metric": lambda columns: columns | {"score": columns["score"] + 0.01},
    "no number": lambda columns: columns | {"score": np.where(columns["id"] == 0, np.nan, columns["score"])},
    "other ids": lambda columns: columns | {"id": columns["id"] + 1},
    "ids that come twice": lambda columns: columns | {"id": columns["id"] // 2},
}


def change_examples(path, change):
    """Change the examples of a run, if it has any; runs that tune have none."""
    if path.exists():
        with np.load(path) as stored:
            columns = change({name: stored[name] for name in stored.files})
        np.savez(path, **columns)


@pytest.mark.parametrize("fault", [*FAULTS, "gone"])
def test_examples_that_do_not_match_give_no_interval_and_a_reason(tmp_path, fault):
    results = read(write_runs(tmp_path, value=gains, generators=["LoRA"], axes={"r": [2]}))
    runs = results.runs
    run = runs.loc[(runs["cell"] == "MAP(LoRA(r=2))") & (runs["seed"] == 4), "run"].item()
    path = tmp_path / run / "examples.npz"
    path.unlink() if fault == "gone" else change_examples(path, FAULTS[fault])
    found = row(effects(results), cell="MAP(LoRA(r=2))")
    assert math.isnan(found["example_low"])
    assert found["example_n"] == 0
    assert "no interval over examples" in found["note"]
    assert math.isfinite(found["low"])
    assert math.isfinite(row(effects(results), cell="DoRA(LoRA(r=2))")["example_low"])


def test_ids_that_come_twice_in_every_run_are_no_pairs_either(tmp_path):
    results = read(write_runs(tmp_path, value=gains, generators=["LoRA"], axes={"r": [2]}))
    for run in results.runs["run"]:
        change_examples(tmp_path / run / "examples.npz", FAULTS["ids that come twice"])
    assert effects(results)["example_low"].isna().all()


def test_another_seed_with_other_examples_gives_no_interval(tmp_path):
    results = read(write_runs(tmp_path, value=gains, generators=["LoRA"], axes={"r": [2]}))
    for run in results.runs.loc[results.runs["seed"] == 4, "run"]:
        change_examples(tmp_path / run / "examples.npz", FAULTS["other ids"])
    assert effects(results)["example_low"].isna().all()


def test_the_order_of_examples_does_not_matter(tmp_path):
    results = read(write_runs(tmp_path, generators=["LoRA"], axes={"r": [2]}))
    before = effects(results)
    for run in results.runs.loc[results.runs["wrapper"] == "MAP", "run"]:
        change_examples(tmp_path / run / "examples.npz", lambda columns: {name: x[::-1] for name, x in columns.items()})
    assert effects(results).equals(before)


def test_the_scores_of_a_loss_are_turned_around(tmp_path):
    results = read(write_runs(tmp_path, value=gains, metric="perplexity", maximise=False, generators=["LoRA"]))
    before = row(effects(results), cell="MAP(LoRA(r=2))")
    for run in results.runs["run"]:
        change_examples(tmp_path / run / "examples.npz", lambda columns: columns | {"score": -columns["score"]})
    after = row(effects(results), cell="MAP(LoRA(r=2))")
    assert (after["example_low"], after["example_high"]) == pytest.approx(
        (before["example_low"], before["example_high"])
    )
    assert after["example_low"] < after["difference"] < after["example_high"]


def test_few_examples_have_no_interval(tmp_path):
    found = row(effects(read(write_runs(tmp_path, value=gains, examples=10))), cell="MAP(LoRA(r=2))")
    assert found["example_n"] == 10
    assert math.isnan(found["example_low"])
    assert "no interval over examples: fewer than 20" in found["note"]


def test_differences_that_are_equal_on_every_example_have_them_as_their_interval(tmp_path):
    results = read(write_runs(tmp_path, value=gains, generators=["LoRA"], axes={"r": [2]}))
    for run in results.runs["run"]:
        change_examples(tmp_path / run / "examples.npz", levelled)
    found = row(effects(results), cell="MAP(LoRA(r=2))")
    assert (found["example_low"], found["example_high"]) == pytest.approx((found["difference"], found["difference"]))


def levelled(columns):
    """Every example scores the mean."""
    return columns | {"score": np.full_like(columns["score"], columns["score"].mean())}
