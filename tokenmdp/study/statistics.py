"""Statistics of a few seeds: estimates with 95% intervals from arrays; nothing here knows about runs or files.

Two kinds of interval. Levels (of one method) are resampled: the stratified percentile bootstrap of Agarwal et al.,
"Deep reinforcement learning at the edge of the statistical precipice" (2021). Paired differences have Student's t,
because a percentile bootstrap of n seeds cannot reach beyond their extremes: with three seeds it excludes zero whenever
they agree in sign, which one time in four is chance. Below `FEWEST_RESAMPLED` seeds nothing is resampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy import stats

from tokenmdp.intervals import RESAMPLES, Estimate, mean_interval

FEWEST_RESAMPLED = 6  # resamples stay within n seeds' range, which misses a median with probability 2**(1 - n)
FEWEST_DECIDING = 3  # seeds; the t interval of two is 25 standard errors wide and says no more than they do
TAILS = (0.025, 0.975)
Values: TypeAlias = Sequence[float] | np.ndarray


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half over the last axis: ``floor(n / 4)`` values are dropped at each end.

    >>> float(interquartile_mean(np.array([-100.0, 1.0, 3.0, 50.0])))
    2.0
    """
    ordered = np.sort(values, axis=-1)
    dropped = values.shape[-1] // 4
    return ordered[..., dropped : values.shape[-1] - dropped].mean(-1)


def mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis."""
    return values.mean(-1)


def stratified_bootstrap(
    strata: Sequence[Values],
    statistic: Callable[[np.ndarray], np.ndarray] = mean,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    fewest: int = FEWEST_RESAMPLED,
) -> Estimate:
    """``statistic`` of all values with its percentile interval; seeds are resampled within each stratum.

    Args:
        strata: one list of values, one per seed, for each setting. They may differ in length.
        statistic: reduces the last axis of (..., N), N values in all.
        seed: of the resampling; the same sizes and seed give the same resamples.
        resamples: how many.
        fewest: values in every stratum, below which there is no interval.

    Raises:
        ValueError: no values.
    """
    columns = [np.asarray(values, dtype=np.float64) for values in strata if len(values)]
    if not columns:
        raise ValueError("no values: a bootstrap needs at least one seed")
    value = float(statistic(np.concatenate(columns)))
    if min(column.size for column in columns) < fewest:
        return without_interval(value)
    random = np.random.default_rng(seed)
    drawn = [column[random.integers(column.size, size=(resamples, column.size))] for column in columns]
    return percentile_interval(value, statistic(np.concatenate(drawn, axis=-1)))


def mean_level(strata: Sequence[Values]) -> Estimate:
    """Mean of all values: `stratified_bootstrap`, but `mean_interval` for one stratum of too few seeds for that.

    Raises:
        ValueError: no values.
    """
    if len(strata) == 1 and 0 < len(strata[0]) < FEWEST_RESAMPLED:
        return mean_interval(strata[0])
    return stratified_bootstrap(strata)


def level(values: Values) -> Estimate:
    """`mean_level` of one setting, without an interval below `FEWEST_DECIDING` seeds.

    >>> level([1.0, 3.0])
    Estimate(value=2.0, low=-inf, high=inf)
    """
    return mean_level([values]) if len(values) >= FEWEST_DECIDING else without_interval(float(np.mean(values)))


def mean_difference(values: Values) -> Estimate:
    """`mean_interval` of one difference per seed, without an interval below `FEWEST_DECIDING` seeds."""
    return mean_interval(values) if len(values) >= FEWEST_DECIDING else without_interval(float(np.mean(values)))


def without_interval(value: float) -> Estimate:
    """An estimate without an interval."""
    return Estimate(value, -math.inf, math.inf)


def percentile_interval(value: float, resampled: np.ndarray) -> Estimate:
    """``value`` with the .025 and .975 quantiles of its resamples (B,), which may be infinite."""
    if np.isfinite(resampled).all():
        low, high = np.quantile(resampled, TAILS)
    else:  # no interpolation: between a number and infinity there is nothing, and inf - inf is not a number
        low, high = np.quantile(resampled, TAILS, method="inverted_cdf")
    return Estimate(value, float(low), float(high))


def paired_difference(values: Values, baseline: Values) -> Estimate:
    """Mean of ``values - baseline``, index by index, with its t interval; a single pair has an infinite one.

    Two methods under the same seed see the same prompts and starting weights, and what they share drops out.

    >>> print(paired_difference([2.0, 3.0, 5.0], [1.0, 2.0, 3.0]))
    1.33 [-0.10, 2.77]

    Raises:
        ValueError: the lengths differ, or there are no pairs.
    """
    left, right = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(
            f"{left.size} values and {right.size} of the baseline are not pairs; give one per seed of each"
        )
    return mean_interval(left - right)


def probability_of_improvement(
    values: Sequence[Values],
    baseline: Sequence[Values],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    fewest: int = FEWEST_RESAMPLED,
) -> Estimate:
    """``P(X > Y) + P(X = Y) / 2`` of one run of each method, averaged over strata (Agarwal et al., 2021).

    In a stratum this is the Mann-Whitney U of all pairs divided by their number. Both methods are resampled
    independently within each stratum. There is no interval below ``fewest`` runs of either, nor where every run of one
    beats every run of the other: no resample differs then, which says nothing about how sure that is.

    >>> probability_of_improvement([[1.0, 2.0, 3.0]], [[0.0, 2.0]]).value
    0.75

    Raises:
        ValueError: the numbers of strata differ, or one is empty.
    """
    random = np.random.default_rng(seed)
    value, drawn, smallest = 0.0, np.zeros(resamples), math.inf
    for left, right in zip(values, baseline, strict=True):
        x, y = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
        if not x.size or not y.size:
            raise ValueError(f"a stratum holds {x.size} and {y.size} values; both methods need at least one")
        wins = (x[:, None] > y) + (x[:, None] == y) / 2  # (n, m)
        counts = [random.multinomial(size, np.full(size, 1 / size), resamples) / size for size in wins.shape]
        value += float(wins.mean()) / len(values)
        drawn += np.einsum("bn,nm,bm->b", counts[0], wins, counts[1]) / len(values)
        smallest = min(smallest, x.size, y.size)
    return _unless_a_point(percentile_interval(value, drawn)) if smallest >= fewest else without_interval(value)


def _unless_a_point(estimate: Estimate) -> Estimate:
    return without_interval(estimate.value) if math.isclose(estimate.low, estimate.high) else estimate


def two_standard_errors(values: Values) -> float:
    """``2 * std / sqrt(n)`` with the sample's standard deviation: the paper's own +-; nan for a single value.

    >>> round(two_standard_errors([1.0, 2.0, 3.0]), 3)
    1.155
    """
    sample = np.asarray(values, dtype=np.float64)
    return float(2 * sample.std(ddof=1) / math.sqrt(sample.size)) if sample.size > 1 else math.nan


def trailing_mean(curves: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last ``window`` values; (..., K) -> (..., K - window + 1), whose entry i ends at i + window - 1.

    Only whole windows: at the ends of a curve a shorter one would be noisier, and a maximum picks noise.

    >>> trailing_mean(np.array([0.0, 2.0, 4.0, 0.0]), 2).tolist()
    [1.0, 3.0, 2.0]
    """
    if not 1 <= window <= curves.shape[-1]:
        raise ValueError(f"window is {window}; it must be at least 1 and at most the {curves.shape[-1]} updates")
    return np.lib.stride_tricks.sliding_window_view(curves, window, axis=-1).mean(-1)


def steps_to_reach(curves: np.ndarray, level: float | np.ndarray) -> np.ndarray:
    """Index of the first value that is at least ``level``, infinity for none; (..., K), (...) -> (...).

    >>> steps_to_reach(np.array([[0.0, 1.0, 3.0], [0.0, 0.0, 1.0]]), 2.0).tolist()
    [2.0, inf]
    """
    reached = curves >= np.asarray(level)[..., None]
    return np.where(reached.any(-1), reached.argmax(-1), np.inf)


def censored_median(steps: np.ndarray, reached: np.ndarray) -> np.ndarray:
    """Kaplan and Meier's median: the first step at which at least half of the seeds would have got there.

    ``S(t) = prod over steps s <= t of (1 - events(s) / at_risk(s))``, median = first t with S(t) <= 1/2, infinity if
    there is none.

    Args:
        steps: (..., n): where a seed reached the level, or where it ended without reaching it.
        reached: (..., n), bool: which of the two. Seeds that end at a step count as at risk there.

    >>> float(censored_median(np.array([10.0, 30.0, 50.0]), np.array([True, True, False])))
    30.0
    """
    order = np.lexsort((~reached, steps), axis=-1)  # among equal steps the events come first
    times, events = np.take_along_axis(steps, order, -1), np.take_along_axis(reached, order, -1)
    at_risk = np.arange(steps.shape[-1], 0, -1)
    survival = np.cumprod(1 - events / at_risk, axis=-1)  # one factor per event: tied ones multiply to the same
    halved = survival <= 0.5 + 1e-12
    first = np.take_along_axis(times, halved.argmax(-1)[..., None], -1)[..., 0]
    return np.where(halved.any(-1), first, np.inf)


def median_steps(
    steps: Values, reached: Values, *, seed: int = 0, resamples: int = RESAMPLES, fewest: int = FEWEST_RESAMPLED
) -> Estimate:
    """`censored_median` with a percentile bootstrap interval over seeds; ends may be infinite: never reached.

    There is no interval below ``fewest`` seeds, nor where all resamples have the same median.
    """
    times, events = np.asarray(steps, dtype=np.float64), np.asarray(reached, dtype=bool)
    value = float(censored_median(times, events))
    if times.size < fewest:
        return without_interval(value)
    drawn = np.random.default_rng(seed).integers(times.size, size=(resamples, times.size))
    return _unless_a_point(percentile_interval(value, censored_median(times[drawn], events[drawn])))


def p_of_interval(estimate: Estimate, seeds: int, threshold: float = 0.0) -> float:
    """The two-sided p of a 95% t interval of ``seeds`` values: below .05 where it leaves ``threshold`` out.

    >>> from scipy import stats
    >>> values = [1.0, 2.0, 4.0]
    >>> bool(np.isclose(p_of_interval(mean_interval(values), 3), stats.ttest_1samp(values, 0).pvalue))
    True
    """
    error = (estimate.high - estimate.low) / 2 / stats.t.ppf(TAILS[1], seeds - 1)
    distance = abs(estimate.value - threshold)
    return float(2 * stats.t.sf(distance / error, seeds - 1)) if error else float(not distance)


def p_of_resamples(resampled: np.ndarray, threshold: float) -> float:
    """Twice the share of resamples (B,) on the rarer side of ``threshold``, itself counted on both; at least 2 / (B+1).

    >>> p_of_resamples(np.arange(99.0), 98.0), p_of_resamples(np.arange(99.0), 49.0)
    (0.04, 1.0)
    """
    rarer = min((resampled >= threshold).sum(), (resampled <= threshold).sum())
    return float(min(1.0, 2 * (rarer + 1) / (resampled.size + 1)))


def holm(p_values: Values) -> np.ndarray:
    """Holm's correction: below .05 for any of n tests with probability at most .05 if no effect is there.

    ``corrected of the i-th smallest = max over j <= i of min(1, (n - j + 1) * p_j)``, in the order given.

    >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
    [0.03, 0.06, 0.06]

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    given = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(given, kind="stable")
    corrected = np.empty_like(given)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(given[order] * np.arange(given.size, 0, -1)))
    return corrected


class Overtaking(NamedTuple):
    """When one method's mean curve passes the highest point of another's; steps as numbers of updates."""

    level: float  # the baseline's maximum
    baseline_step: float  # where the baseline has it
    step: float  # where the method reaches it; infinity: never
    share: Estimate  # step / baseline_step
    resampled: np.ndarray  # that share in each resample; none without an interval


def overtaking(
    curves: np.ndarray,
    baseline: np.ndarray,
    updates: Values,
    *,
    window: int,
    seed: int = 0,
    resamples: int = RESAMPLES,
    fewest: int = FEWEST_RESAMPLED,
) -> Overtaking:
    """In what share of its steps a method reaches the maximum of the baseline's mean curve.

    Both curves are trailing means over ``window`` updates of the mean over seeds. The interval resamples seeds, both
    methods' together since they are pairs, and finds level and steps again each time.

    Args:
        curves: (R, K), one row per seed.
        baseline: (R, K), the same seeds.
        updates: (K,), the number of each update.
        window: updates in a trailing mean.
        seed: of the resampling.
        resamples: how many.
        fewest: seeds, below which the share has no interval.
    """
    places = np.asarray(updates, dtype=np.float64)[window - 1 :]

    def measure(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        own = trailing_mean(counts @ curves, window)
        other = trailing_mean(counts @ baseline, window)
        level, first = other.max(-1), steps_to_reach(own, other.max(-1))
        step = np.where(np.isfinite(first), places[np.where(np.isfinite(first), first, 0).astype(int)], np.inf)
        return level, places[other.argmax(-1)], step

    runs = curves.shape[0]
    level, baseline_step, step = (float(part) for part in measure(np.full(runs, 1 / runs)))
    if runs < fewest:
        share, shares = without_interval(step / baseline_step), np.zeros(0)
    else:
        counts = np.random.default_rng(seed).multinomial(runs, np.full(runs, 1 / runs), resamples) / runs
        _, other_steps, steps = measure(counts)
        shares = steps / other_steps
        share = percentile_interval(step / baseline_step, shares)
    return Overtaking(level, baseline_step, step, share, shares)
