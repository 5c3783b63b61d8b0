"""Estimates of a few seeds that only the claims need: a ratio of means, a share of runs, a slope."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

from tokenmdp.intervals import Estimate, mean_interval
from tokenmdp.study.statistics import Values, without_interval


def jackknife(rows: np.ndarray, statistic: Callable[[np.ndarray], float]) -> Estimate:
    """A statistic of seeds that is not their mean, such as a ratio of means, with a t interval.

    ``pseudo_i = n * statistic(rows) - (n - 1) * statistic(rows without i)``; their mean is the estimate (Tukey 1958).

    Args:
        rows: (n, ...), one row per seed.
        statistic: (m, ...) -> a number, for m = n and n - 1.

    >>> jackknife(np.array([1.0, 2.0, 6.0]), np.mean) == mean_interval([1.0, 2.0, 6.0])
    True
    """
    seeds, value = len(rows), statistic(rows)
    if seeds < 2:
        return without_interval(value)
    left_out = [statistic(np.delete(rows, seed, axis=0)) for seed in range(seeds)]
    return mean_interval(seeds * value - (seeds - 1) * np.array(left_out))


def difference_of_shares(own: tuple[int, int], other: tuple[int, int]) -> Estimate:
    """``own[0] / own[1] - other[0] / other[1]`` of (number, runs), with an interval that is never too narrow.

    Both shares lie in their 97.5% Clopper-Pearson intervals with a probability of 95% or more, so their difference lies
    between the differences of the ends.

    >>> print(difference_of_shares((3, 5), (0, 5)))
    0.60 [-0.48, 0.96]

    Raises:
        ValueError: no runs, or fewer than ``number``.
    """
    left, right = (stats.binomtest(*counts).proportion_ci(0.975) for counts in (own, other))
    return Estimate(own[0] / own[1] - other[0] / other[1], float(left.low - right.high), float(left.high - right.low))


def fisher(own: tuple[int, int], other: tuple[int, int]) -> float:
    """Two-sided p of Fisher's exact test that two shares (number, runs) are equal.

    >>> round(fisher((3, 5), (0, 5)), 2)
    0.17
    """
    return float(stats.fisher_exact([[number, runs - number] for number, runs in (own, other)]).pvalue)


def slope(values: np.ndarray, places: Values) -> np.ndarray:
    """Least-squares slope over the last axis; values (..., K), places (K,) -> (...).

    >>> float(slope(np.array([1.0, 2.0, 3.0]), [0.0, 2.0, 4.0]))
    0.5

    Raises:
        ValueError: all places are equal.
    """
    at = np.asarray(places, dtype=np.float64)
    centred = at - at.mean()
    if not centred.any():
        raise ValueError(f"a slope needs two different places, all are {at[0]:g}")
    return np.asarray(values @ centred / (centred @ centred))
