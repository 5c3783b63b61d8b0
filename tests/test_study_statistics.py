"""Statistics of seeds against scipy, exhaustive resampling and cases done by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from tokenmdp.study.statistics import (
    Estimate,
    censored_median,
    difference_at_equal_kl,
    interquartile_mean,
    mean,
    median_steps,
    overtaking,
    paired_difference,
    pareto_front,
    percentile_interval,
    probability_of_improvement,
    score_at_kl,
    slope,
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
    ours = stratified_bootstrap(strata, resamples=40_000)
    assert ours.value == pytest.approx(8.0)
    assert ours[1:] == pytest.approx(tuple(np.quantile(every, [0.025, 0.975], method="inverted_cdf")), abs=0.21)
    between = stratified_bootstrap([[0.0, 0.0], [10.0, 10.0]])
    assert between == Estimate(5.0, 5.0, 5.0)  # the strata differ, which is no uncertainty


def test_the_bootstrap_is_seeded():
    assert stratified_bootstrap([TEN], seed=3) == stratified_bootstrap([TEN], seed=3)
    assert stratified_bootstrap([TEN], seed=3) != stratified_bootstrap([TEN], seed=4)


def test_one_seed_has_no_interval():
    for estimate in (
        stratified_bootstrap([[2.0]]),
        stratified_bootstrap([[1.0], [3.0]]),
        paired_difference([3.0], [1.0]),
    ):
        assert estimate == Estimate(2.0, -np.inf, np.inf)
        assert str(estimate) == "2.00"
        assert estimate.side(-100) == 0
    assert probability_of_improvement([[2.0]], [[1.0]]) == Estimate(1.0, -np.inf, np.inf)
    assert median_steps([4.0], [True]).low == -np.inf


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
    assert stratified_bootstrap([differences]).side() == 1
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
    ours = probability_of_improvement(left, right, resamples=5000)
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
    assert median_steps(steps, np.zeros(6, dtype=bool)) == Estimate(np.inf, np.inf, np.inf)


def test_an_interval_of_finite_and_infinite_resamples_is_no_nan():
    assert percentile_interval(1.0, np.array([1.0] * 99 + [np.inf] * 5)) == Estimate(1.0, 1.0, np.inf)


def test_steps_to_reach_a_level_of_its_own_for_each_curve():
    curves = np.array([[0.0, 2.0, 1.0], [0.0, 1.0, 4.0], [9.0, 9.0, 9.0]])
    assert steps_to_reach(curves, np.array([2.0, 5.0, 1.0])).tolist() == [1.0, np.inf, 0.0]


def test_overtaking_by_hand():
    updates = np.arange(1, 11)
    baseline = np.minimum(updates, 8.0) * np.ones((4, 1))  # its maximum, 8, at update 8
    result = overtaking(np.minimum(2.0 * updates, 10.0) * np.ones((4, 1)), baseline, updates, window=1)
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


def test_score_at_kl_is_piecewise_linear_and_undefined_outside():
    points = ([3.0, 1.0, 2.0], [9.0, 1.0, 4.0])
    assert score_at_kl(*points, [1.0, 1.5, 2.5, 3.0]).tolist() == [1.0, 2.5, 6.5, 9.0]
    assert np.isnan(score_at_kl(*points, [0.9, 3.1])).all()


@given(st.lists(numbers, min_size=2, max_size=6), numbers)
def test_at_equal_kl_a_shift_in_score_is_the_difference(scores, shift):
    kl = np.arange(len(scores)) * 1.0
    other = np.array(scores) + shift
    assert difference_at_equal_kl((kl, other), (kl, scores)) == pytest.approx(shift, abs=1e-9)
    moved = difference_at_equal_kl((kl + 100, other), (kl, scores))
    assert np.isnan(moved)


def test_spending_more_kl_on_the_same_curve_is_no_difference_at_equal_kl():
    kl = np.linspace(0, 4, 9)
    assert difference_at_equal_kl((2 * kl, 3 * 2 * kl), (kl, 3 * kl)) == pytest.approx(0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_pareto_front_is_what_no_point_dominates(points):
    def beaten(point):
        return any(
            other[0] <= point[0] and other[1] >= point[1] and other != point for other in points
        )  # at most its KL, at least its score

    front = pareto_front(*zip(*points, strict=True))
    kept = [points[place] for place in front]
    assert kept == sorted({point for point in points if not beaten(point)})
