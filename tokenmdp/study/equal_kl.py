"""Methods compared where they have spent the same KL: by their runs' own updates, or by where runs ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tokenmdp.study.outcomes import collapsed, last_tenth, paired
from tokenmdp.study.results import CellResult
from tokenmdp.study.statistics import Values

EDGES = (6.0, 9.0, 12.0, 15.0)  # nats a response: from where methods differ to where the paper's policies end
LEAST_SHARED = 0.25  # of the KL that two methods cover between them; over less, a lead holds only in a corner


def scores_in_bins(kl: np.ndarray, score: np.ndarray, edges: Sequence[float] = EDGES) -> np.ndarray:
    """Mean score of the updates whose KL lies in ``[edges[i], edges[i + 1])``; nan in a bin that a run never visits.

    kl and score (..., K) -> (..., len(edges) - 1). A run that passes through a bin twice, or breaks there, counts with
    all its updates there, whichever method it is of.

    >>> scores_in_bins(np.array([5.0, 7.0, 8.0, 40.0]), np.array([0.0, 1.0, 2.0, -9.0]), (6, 9, 12)).tolist()
    [1.5, nan]
    """
    inside = [(low <= kl) & (kl < high) for low, high in pairwise(edges)]  # bins of (..., K)
    there = np.stack(inside, axis=-2)
    sums, counts = np.where(there, score[..., None, :], 0.0).sum(-1), there.sum(-1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def leads_in_bins(
    own: Sequence[CellResult], baseline: Sequence[CellResult], edges: Sequence[float] = EDGES
) -> np.ndarray:
    """`scores_in_bins` of each seed's run, less those of the baseline's run of that seed; (R, bins), nan where one is.

    Nothing is interpolated and no run is left out.
    """
    scores = [
        [scores_in_bins(np.array(cell.metrics["kl"]), np.array(cell.metrics["score_mean"]), edges) for cell in row]
        for row in paired(own, baseline)
    ]
    return np.array([left - right for left, right in scores]).reshape(-1, len(edges) - 1)


def mean_leads(leads: np.ndarray) -> np.ndarray:
    """Each seed's mean over the bins that it has, (R, bins) -> (S,); a seed with none is left out.

    >>> mean_leads(np.array([[1.0, 3.0], [5.0, np.nan], [np.nan, np.nan]])).tolist()
    [2.0, 5.0]
    """
    some = leads[np.isfinite(leads).any(-1)]
    return np.nanmean(some, axis=-1) if some.size else np.zeros(0)


class EqualKL(NamedTuple):
    """The lead of one method over another over the KL that every seed of both covers."""

    differences: np.ndarray  # (R,), one per seed; none if less than `LEAST_SHARED` is shared
    shared: float  # that KL as a share of all that any of these seeds covers
    seeds: int  # with all cells of both methods; R or more
    collapsed: int  # cells that were left out


def equal_kl(own: Sequence[Sequence[CellResult]], baseline: Sequence[Sequence[CellResult]]) -> EqualKL:
    """Compare two methods whose cells differ in the KL coefficient.

    A point is the KL and the score of a cell's last tenth; a seed's points are joined by straight lines, and compared
    over the KL that is common to all seeds, so that each seed counts the same. A collapsed cell does not belong on a
    line through healthy ones and is left out, and so is a seed with one point left.

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
