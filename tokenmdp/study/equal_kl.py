"""Score against KL to the reference: two methods where they spend the same, and the points that none beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tokenmdp.study.outcomes import collapsed, last_tenth, paired
from tokenmdp.study.results import CellResult
from tokenmdp.study.statistics import Values

LEAST_SHARED = 0.25  # of the KL that two methods cover between them; over less a lead is that of a corner


class EqualKL(NamedTuple):
    """The lead of one method over another over the KL that every seed of both covers."""

    differences: np.ndarray  # (R,), a seed; none if less than `LEAST_SHARED` is shared
    shared: float  # that KL as a share of all that any of these seeds covers
    seeds: int  # with all cells of both methods; R or more
    collapsed: int  # cells that were left out


def equal_kl(own: Sequence[Sequence[CellResult]], baseline: Sequence[Sequence[CellResult]]) -> EqualKL:
    """Compare two methods whose cells differ in the KL coefficient.

    A point is the KL and the score of a cell's last tenth; a seed's points are joined by straight lines, and compared
    over the KL that is common to all seeds, so that each seed counts the same. A collapsed cell is no point of a line
    through healthy ones and is left out, and so is a seed with one point left.

    Args:
        own: for each coefficient, the method's seeds.
        baseline: the same of the other method.
    """
    rows = paired(*own, *baseline)
    lines = [(_line(row[: len(own)]), _line(row[len(own) :])) for row in rows]
    fallen = sum(collapsed(cell) for row in rows for cell in row)
    kept = [pair for pair in lines if all(len(line) > 1 for line in pair)]
    ends = np.array([(line[:, 0].min(), line[:, 0].max()) for pair in kept for line in pair]).reshape(-1, 2)
    low, high = (ends[:, 0].max(), ends[:, 1].min()) if kept else (0.0, 0.0)
    covered = float(np.ptp(ends)) if kept else 0.0
    shared = max(0.0, float(high - low)) / covered if covered else 0.0
    differences = [
        difference_at_equal_kl(tuple(left.T), tuple(right.T), (low, high))
        for left, right in kept
        if shared >= LEAST_SHARED
    ]
    return EqualKL(np.array(differences), shared, len(rows), fallen)


def _line(cells: Sequence[CellResult]) -> np.ndarray:
    """(points, 2): KL and score of the cells that have not collapsed."""
    points = [(last_tenth(cell, "kl"), last_tenth(cell)) for cell in cells if not collapsed(cell)]
    return np.array([point for point in points if np.isfinite(point).all()]).reshape(-1, 2)


def score_at_kl(kl: Values, score: Values, at: Values) -> np.ndarray:
    """Score at given KL by linear interpolation between the points (kl, score); nan outside of them.

    >>> score_at_kl([4.0, 0.0], [3.0, 1.0], [1.0, 5.0]).tolist()
    [1.5, nan]
    """
    places, heights = np.asarray(kl, dtype=np.float64), np.asarray(score, dtype=np.float64)
    order = np.argsort(places, kind="stable")
    return np.interp(at, places[order], heights[order], left=np.nan, right=np.nan)


def difference_at_equal_kl(
    points: tuple[Values, Values], baseline: tuple[Values, Values], between: tuple[float, float], places: int = 33
) -> float:
    """Mean difference of two interpolated (kl, score) curves between two KL; nan where one does not reach.

    >>> difference_at_equal_kl(([0.0, 2.0], [1.0, 3.0]), ([1.0, 3.0], [1.0, 3.0]), (1.0, 2.0))
    1.0
    """
    at = np.linspace(*between, places)
    return float(np.mean(score_at_kl(*points, at) - score_at_kl(*baseline, at)))


def pareto_front(kl: Values, score: Values) -> list[int]:
    """Indices of the points that no other beats (at most its KL and a higher score, or less KL and its score), by KL.

    >>> pareto_front([3.0, 1.0, 2.0], [5.0, 2.0, 1.0])
    [1, 0]
    """
    spent, gained = np.asarray(kl, dtype=np.float64), np.asarray(score, dtype=np.float64)
    front: list[int] = []
    best = -math.inf
    for place in np.lexsort((-gained, spent)):
        if gained[place] > best:
            front.append(int(place))
            best = float(gained[place])
    return front
