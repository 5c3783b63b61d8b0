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


def share_of_runs(number: int, runs: int) -> Estimate:
    """``number / runs`` with Clopper and Pearson's exact interval: what is rare among few runs may still be likely.

    >>> print(share_of_runs(2, 10))
    0.20 [0.03, 0.56]

    Raises:
        ValueError: no runs, or fewer than ``number``.
    """
    interval = stats.binomtest(number, runs).proportion_ci()
    return Estimate(number / runs, float(interval.low), float(interval.high))


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
