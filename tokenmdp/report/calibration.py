"""Calibration of a reward model: how often a response is preferred that it prefers with probability P."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tokenmdp.intervals import Estimate, bootstrap_interval
from tokenmdp.report.colours import COLOURS
from tokenmdp.report.drawing import dress, error_bars, lay_out, new_figure, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEWEST = 10  # pairs in a bin that is shown
PREDICTED, OBSERVED = "P(higher-scored response is preferred)", "share of pairs in which it was"


class Bin(NamedTuple):
    """Pairs whose predictions are alike."""

    predicted: float  # mean probability that the response with the higher score is preferred
    observed: Estimate  # share in which it was
    pairs: int


def bins(gaps: np.ndarray, number: int = 8, error_rate: float = 0.0) -> list[Bin]:
    """Pairs by ``P = e / 2 + (1 - e) sigma(|gap|)`` in bins of equal count, each of at least `FEWEST` pairs.

    Args:
        gaps: (n,) score of the chosen response less that of the rejected one, log-odds.
        number: of bins, or fewer where there are too few pairs; none for less than `FEWEST`.
        error_rate: e, the share of labels that the model takes for coin flips.

    >>> [round(one.predicted, 2) for one in bins(np.array([0.0] * 20 + [2.0] * 20), number=2)]
    [0.5, 0.88]
    """
    order = np.argsort(np.abs(gaps), kind="stable")
    found = []
    number = min(number, len(gaps) // FEWEST)
    for part in np.array_split(order, number) if number else ():
        own = gaps[part]
        sure = float((1 / (1 + np.exp(-np.abs(own)))).mean())
        predicted = error_rate / 2 + (1 - error_rate) * sure
        found.append(Bin(predicted, bootstrap_interval((own > 0) + (own == 0) / 2), len(part)))
    return found


def plot(found: Sequence[Bin], pairs: int, path: str | Path) -> Path:
    """Draw bins of ``pairs`` held-out pairs against the diagonal of a calibrated model, with 95% intervals."""
    figure = new_figure(4.8, 4.4)
    axes = figure.subplots()
    draw(axes, found, "held-out pairs", COLOURS[0])
    title = f"{pairs} held-out pairs, {found[0].pairs} per bin; 95% intervals"
    dress(axes, title, f"predicted: {PREDICTED}", f"observed: {OBSERVED}")
    axes.legend(frameon=False, loc="upper left")
    lay_out(figure)
    return write_png(figure, path)


def draw(axes: Axes, found: Sequence[Bin], label: str, colour: str, marker: str = "o") -> None:
    """Bins with their intervals, and once in each axes the diagonal of a calibrated model."""
    if not axes.lines:
        axes.plot([0.5, 1], [0.5, 1], color="#999999", linewidth=1, label="calibrated")
    axes.errorbar(
        [one.predicted for one in found], [one.observed.value for one in found],
        yerr=error_bars([one.observed for one in found]), fmt=marker, color=colour, capsize=2, label=label,
    )  # fmt: skip
    axes.set_xlim(0.48, 1.02)
