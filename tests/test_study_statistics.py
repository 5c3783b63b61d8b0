"""Statistics of seeds against scipy, exhaustive resampling and cases done by hand."""

import itertools

import numpy as np
import pytest
from abc_study.estimates import difference_of_shares, fisher, jackknife, slope
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from tokenmdp.intervals import Estimate, mean_interval
from tokenmdp.study.statistics import (
    censored_median,
    holm,
    interquartile_mean,
    mean,
    mean_level,
    median_steps,
    overtaking,
    p_of_interval,
    p_of_resamples,
    paired_difference,
    percentile_interval,
    probability_of_improvement,
    steps_to_reach,
    stratified_bootstrap,
    trailing_mean,
    two_standard_errors,
)

TEN = np.array([7.1, 7.9, 6.2, 8.4, 7.7, 9.0, 3.1, 7.2, 8.8, 7.5])
numbers = st.floats(-100, 100).map(lambda value: round(value, 3))
few = st.lists(numbers, min_size=1, max_size=12)


@given(few)
def test_interquartile_mean_is_scipys_trimmed_mean(values):
    assert interquartile_mean(np.array(values)) == pytest.approx(stats.trim_mean(values, 0.25))


@pytest.mark.parametrize("statistic", [mean, interquartile_mean])
def test_the_bootstrap_of_one_stratum_is_scipys(statistic):
    ours = stratified_bootstrap([TEN], statistic, resamples=20_000)
    theirs = stats.bootstrap((TEN,), lambda x, axis: statistic(np.moveaxis(x, axis, -1)), n_resamples=20_000,
                             method="percentile", rng=np.random.default_rng(1))  # fmt: skip
    assert ours.value == pytest.approx(float(statistic(TEN)))
    assert ours[1:] == pytest.approx(tuple(theirs.confidence_interval), abs=0.05)


def test_strata_are_resampled_within_themselves():
    strata = [[0.0, 1.0], [10.0, 12.0, 17.0]]
    every = [
        np.mean([*first, *second])
        for first in itertools.product(strata[0], repeat=2)
        for second in itertools.product(strata[1], repeat=3)
    ]
    ours = stratified_bootstrap(strata, resamples=40_000, fewest=2)
    assert ours.value == pytest.approx(8.0)
    assert ours[1:] == pytest.approx(tuple(np.quantile(every, [0.025, 0.975], method="inverted_cdf")), abs=0.21)
    between = stratified_bootstrap([[0.0, 0.0], [10.0, 10.0]], fewest=2)
    assert between == Estimate(5.0, 5.0, 5.0)  # the strata differ, which is not uncertainty


def test_the_bootstrap_is_seeded():
    assert stratified_bootstrap([TEN], seed=3) == stratified_bootstrap([TEN], seed=3)
    assert stratified_bootstrap([TEN], seed=3) != stratified_bootstrap([TEN], seed=4)


def test_one_seed_has_no_interval():
    for estimate in (
        stratified_bootstrap([[2.0]]),
        stratified_bootstrap([[1.0], [3.0]]),
        mean_level([[2.0]]),
        jackknife(np.array([2.0]), np.mean),
        paired_difference([3.0], [1.0]),
    ):
        assert estimate == Estimate(2.0, -np.inf, np.inf)
        assert str(estimate) == "2.00"
        assert estimate.side(-100) == 0
    assert probability_of_improvement([[2.0]], [[1.0]]) == Estimate(1.0, -np.inf, np.inf)
    assert median_steps([4.0], [True]).low == -np.inf


@pytest.mark.parametrize("seeds", [5, 6])
def test_below_six_seeds_nothing_is_resampled(seeds):
    values, other = TEN[:seeds], TEN[-seeds:]
    updates = np.arange(1, 11)
    estimates = [
        stratified_bootstrap([values]),
        stratified_bootstrap([TEN, values]),
        probability_of_improvement([values], [other]),
        probability_of_improvement([values], [TEN]),
        median_steps(values, np.ones(seeds, dtype=bool)),
        overtaking(values[:, None] * updates, other[:, None] * updates, updates, window=1).share,
    ]
    assert {np.isfinite(estimate.low) for estimate in estimates} == {seeds == 6}


def test_resamples_that_are_all_the_same_are_no_interval():
    assert probability_of_improvement([TEN + 100], [TEN]) == Estimate(1.0, -np.inf, np.inf)
    assert median_steps(np.full(10, 8.0), np.ones(10, dtype=bool)) == Estimate(8.0, -np.inf, np.inf)


def test_a_mean_of_few_seeds_has_a_t_interval():
    theirs = stats.ttest_1samp(TEN[:5], 0).confidence_interval()
    assert mean_level([TEN[:5]])[1:] == pytest.approx((theirs.low, theirs.high))
    assert mean_level([TEN]) == stratified_bootstrap([TEN])
    assert mean_level([TEN[:5], TEN[:5]]).low == -np.inf


@pytest.mark.parametrize(("seeds", "coverage"), [(6, 0.86), (10, 0.89)])
def test_how_often_a_bootstrap_interval_holds_the_truth(seeds, coverage):
    """The numbers that the tables' legend gives."""
    random = np.random.default_rng(0)
    found = [stratified_bootstrap([random.normal(size=seeds)], resamples=1000) for _ in range(3000)]
    assert np.mean([estimate.side() == 0 for estimate in found]) == pytest.approx(coverage, abs=0.015)


def test_the_jackknife_of_a_mean_is_the_t_interval():
    assert jackknife(TEN, np.mean) == pytest.approx(mean_interval(TEN))


def test_the_jackknife_of_a_ratio_covers_where_a_known_denominator_does_not():
    """Ratio of two means, 1 in truth, with a noisy denominator."""
    random = np.random.default_rng(0)
    held = {"jackknife": 0, "known": 0}
    for _ in range(1000):
        rows = np.stack([random.normal(4, 0.2, 8), random.normal(4, 1.5, 8)], axis=1)
        held["jackknife"] += jackknife(rows, lambda kept: kept[:, 0].mean() / kept[:, 1].mean()).side(1.0) == 0
        held["known"] += paired_difference(rows[:, 0] / rows[:, 1].mean(), np.ones(8)).side() == 0
    assert held["jackknife"] > 920
    assert held["known"] < 500


def test_no_values_is_an_error():
    with pytest.raises(ValueError, match="at least one seed"):
        stratified_bootstrap([[], []])
    with pytest.raises(ValueError, match="2 values and 1 of the baseline"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="holds 1 and 0 values"):
        probability_of_improvement([[1.0]], [[]])


def test_paired_difference_is_scipys_paired_t_test():
    other = TEN[::-1] - 0.3
    theirs = stats.ttest_rel(TEN, other).confidence_interval(0.95)
    assert paired_difference(TEN, other)[1:] == pytest.approx((theirs.low, theirs.high))


def test_three_seeds_of_one_sign_decide_a_bootstrap_and_not_a_t_interval():
    differences = np.array([0.1, 1.0, 2.0])
    assert stratified_bootstrap([differences], fewest=2).side() == 1
    assert paired_difference(differences, np.zeros(3)).side() == 0


@given(few, few)
def test_probability_of_improvement_is_mann_whitneys_u(values, baseline):
    u = stats.mannwhitneyu(values, baseline).statistic
    ours = probability_of_improvement([values], [baseline], resamples=10)
    assert ours.value == pytest.approx(u / (len(values) * len(baseline)))
    swapped = probability_of_improvement([baseline], [values], resamples=10)
    assert ours.value + swapped.value == pytest.approx(1)


def test_probability_of_improvement_averages_strata_and_resamples_both_methods():
    left, right = [[1.0, 4.0], [5.0, 6.0]], [[2.0, 3.0], [1.0, 2.0]]
    every = [
        np.mean([[x > y for x in a for y in b]])
        for a in itertools.product(left[0], repeat=2)
        for b in itertools.product(right[0], repeat=2)
    ]
    expected = np.quantile(np.add(every, 1) / 2, [0.025, 0.975])
    ours = probability_of_improvement(left, right, resamples=5000, fewest=2)
    assert ours.value == 0.75
    assert ours[1:] == pytest.approx(tuple(expected))


def test_two_standard_errors_are_twice_scipys():
    assert two_standard_errors(TEN) == pytest.approx(2 * stats.sem(TEN))
    assert np.isnan(two_standard_errors([1.0]))


@given(arrays(float, (3, 5), elements=numbers), st.lists(numbers, min_size=5, max_size=5, unique=True))
def test_slope_is_scipys_line(values, places):
    ours = slope(values, places)
    for row, own in zip(values, ours, strict=True):
        assert own == pytest.approx(stats.linregress(places, row).slope, rel=1e-6, abs=1e-6)


def test_a_slope_needs_two_places():
    with pytest.raises(ValueError, match=r"all are 0\.8"):
        slope(np.ones(2), [0.8, 0.8])


def test_trailing_mean_by_hand():
    curves = np.arange(12.0).reshape(2, 6) ** 2
    assert trailing_mean(curves, 3) == pytest.approx(
        np.array([[row[end - 3 : end].mean() for end in range(3, 7)] for row in curves])
    )
    assert np.array_equal(trailing_mean(curves, 1), curves)
    with pytest.raises(ValueError, match="window is 7"):
        trailing_mean(curves, 7)


@given(st.lists(st.tuples(st.integers(1, 8), st.booleans()), min_size=1, max_size=12))
def test_censored_median_is_where_scipys_survival_function_crosses_a_half(observed):
    times, events = (np.array(column) for column in zip(*observed, strict=True))
    survival = stats.ecdf(stats.CensoredData.right_censored(times.astype(float), ~events)).sf
    below = survival.quantiles[survival.probabilities <= 0.5 + 1e-12]
    assert censored_median(times.astype(float), events) == (below[0] if below.size else np.inf)


def test_median_steps_may_be_never():
    reached = np.array([True] * 4 + [False] * 2)
    steps = np.array([30.0, 35.0, 40.0, 60.0, 150.0, 150.0])
    estimate = median_steps(steps, reached)
    assert estimate.value == 40.0
    assert estimate.low == 30.0
    assert estimate.high == np.inf
    assert median_steps(steps, ~reached).value == 150.0
    assert median_steps(steps, np.zeros(6, dtype=bool)).value == np.inf


def test_an_interval_of_finite_and_infinite_resamples_is_no_nan():
    assert percentile_interval(1.0, np.array([1.0] * 99 + [np.inf] * 5)) == Estimate(1.0, 1.0, np.inf)


def test_steps_to_reach_a_level_of_its_own_for_each_curve():
    curves = np.array([[0.0, 2.0, 1.0], [0.0, 1.0, 4.0], [9.0, 9.0, 9.0]])
    assert steps_to_reach(curves, np.array([2.0, 5.0, 1.0])).tolist() == [1.0, np.inf, 0.0]


def test_overtaking_by_hand():
    updates = np.arange(1, 11)
    baseline = np.minimum(updates, 8.0) * np.ones((6, 1))  # its maximum, 8, at update 8
    result = overtaking(np.minimum(2.0 * updates, 10.0) * np.ones((6, 1)), baseline, updates, window=1)
    assert result[:3] == (8.0, 8.0, 4.0)
    assert result.share == Estimate(0.5, 0.5, 0.5)
    never = overtaking(baseline - 1, baseline, updates, window=1)
    assert never.step == np.inf
    assert never.share.side(0.5) == 1


def test_overtaking_compares_means_over_seeds_and_says_how_sure_it_is():
    updates = np.arange(1, 41)
    random = np.random.default_rng(0)
    baseline = updates + random.normal(0, 1, (8, 40))
    speeds = random.uniform(1.5, 6.0, (8, 1))
    result = overtaking(speeds * updates, baseline, updates, window=4)
    smoothed = trailing_mean(baseline.mean(0), 4)
    assert result.level == pytest.approx(smoothed.max())
    assert result.step == updates[3:][trailing_mean(speeds.mean() * updates, 4) >= result.level][0]
    assert result.share.low < result.share.value < result.share.high


def test_holm_is_uniform_over_orders_and_never_below_the_raw_p():
    rng = np.random.default_rng(0)
    raw, order = rng.uniform(size=7), rng.permutation(7)
    assert (holm(raw) >= raw).all()
    np.testing.assert_allclose(holm(raw[order]), holm(raw)[order])
    assert holm([0.2]).tolist() == [0.2]
    assert holm([]).size == 0


def test_holm_lets_one_of_many_nulls_through_in_one_of_twenty_studies():
    """16 tests without an effect: the least raw p is below .05 in more than half of the studies, Holm's in 5%."""
    studies = np.random.default_rng(1).uniform(size=(2000, 16))
    assert (studies.min(1) < 0.05).mean() > 0.5
    assert np.mean([holm(study).min() < 0.05 for study in studies]) == pytest.approx(0.05, abs=0.015)


def test_holm_keeps_an_effect_among_nulls():
    corrected = holm([1e-5, *np.linspace(0.1, 0.9, 15)])
    assert corrected[0] == pytest.approx(16e-5)
    assert (corrected[1:] > 0.05).all()


@given(arrays(float, st.integers(3, 12), elements=numbers), numbers)
def test_p_of_an_interval_is_scipys_and_agrees_with_the_interval(values, threshold):
    if np.ptp(values) < 1e-6:
        return
    estimate = mean_interval(values)
    p = p_of_interval(estimate, values.size, threshold)
    assert p == pytest.approx(stats.ttest_1samp(values, threshold).pvalue, rel=1e-6, abs=1e-12)
    assert (p < 0.05) == (estimate.side(threshold) != 0) or p == pytest.approx(0.05, abs=1e-6)


def test_p_of_resamples_counts_both_sides_alike():
    drawn = np.random.default_rng(0).normal(1.0, 0.5, 1999)
    assert p_of_resamples(drawn, 0.0) == pytest.approx(p_of_resamples(-drawn, 0.0))
    assert p_of_resamples(drawn, 0.0) == pytest.approx(2 * stats.norm.sf(2), abs=0.015)
    assert p_of_resamples(np.full(99, np.inf), 0.5) == pytest.approx(0.02)


@pytest.mark.parametrize(("own", "other"), [((3, 5), (0, 5)), ((9, 10), (1, 10)), ((0, 3), (0, 3))])
def test_a_difference_of_shares_is_symmetric_and_wider_than_fishers_test_needs(own, other):
    ahead, behind = difference_of_shares(own, other), difference_of_shares(other, own)
    assert (behind.value, behind.low, behind.high) == pytest.approx((-ahead.value, -ahead.high, -ahead.low))
    assert fisher(own, other) == pytest.approx(fisher(other, own))
    assert fisher(own, other) < 0.05 if ahead.side() else True
