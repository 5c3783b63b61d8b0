"""Drawing for the figures of a study: curves with bands, points with intervals, rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tokenmdp.intervals import Estimate
from tokenmdp.report.colours import Look
from tokenmdp.report.curves import band
from tokenmdp.report.drawing import INK, PAPER, finite, label_ends, with_interval
from tokenmdp.study.labels import name_of
from tokenmdp.study.outcomes import Groups, collapsed, curves, window_for
from tokenmdp.study.statistics import FEWEST_DECIDING, FEWEST_RESAMPLED, trailing_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_RUNS = 10  # of a curve that are drawn one by one
RUN_POINTS = 15  # of each such run, means of as many updates
BAND = 0.1  # opacity of a band
SCORE, KL = "score of the reward model", "KL to the reference, nats a response"


def draw_band(axes: Axes, places: np.ndarray, values: np.ndarray, look: Look) -> np.ndarray:
    """The mean over runs (R, K) -> (K,) as a thick line, each of few runs as a thin one, and the mean's 95% t band.

    Two runs have no band: at 12.7 standard errors it would hide every curve and say no more than they do.
    """
    mean, half = band(values)
    if len(values) >= FEWEST_DECIDING:
        opacity = BAND if len(values) >= FEWEST_RESAMPLED else BAND / 2  # wide bands would hide what they are of
        axes.fill_between(places, mean - half, mean + half, color=look.colour, alpha=opacity, linewidth=0)
    if 1 < len(values) <= MOST_RUNS:
        parts = np.array_split(np.arange(len(places)), min(RUN_POINTS, len(places)))
        across, heights = (np.stack([row[..., part].mean(-1) for part in parts], -1) for row in (places, values))
        draw_runs(axes, np.broadcast_to(across, heights.shape), heights, look)
    axes.plot(places, mean, color=look.colour, linestyle=look.dashes, linewidth=2.2, zorder=2.1)
    return mean


def draw_runs(axes: Axes, across: np.ndarray, up: np.ndarray, look: Look) -> None:
    """Runs (R, K) as thin lines, fainter the more there are. They are one path: nan lifts the pen."""
    lifted = (np.pad(part, ((0, 0), (0, 1)), constant_values=np.nan).ravel() for part in (across, up))
    axes.plot(*lifted, color=look.colour, linewidth=0.6, alpha=min(0.5, 3 / len(up)), zorder=1.9)


def draw_curves(
    axes: Axes,
    groups: Groups,
    styles: Mapping[str, Look],
    key: str = "score_mean",
    noun: str = "score",
    *,
    named: bool = True,
) -> list[str]:
    """Mean over seeds of a metric, in words the ``noun``, against updates, with bands; ``named`` at the right edge.

    A cross marks the end of a run that lost what it had gained; at the upper or lower edge, if it ended beyond.

    Returns what the picture does not show: mean curves that run out of it, since it is scaled to most seeds.
    """
    ends, finals, ranges, means, last = {}, {}, [], {}, 1.0
    for method, results in groups.items():
        updates, values = curves(results, key)
        window = window_for(len(updates))
        smooth, places = trailing_mean(values, window), updates[window - 1 :]
        means[method] = mean = draw_band(axes, places, smooth, styles[method])
        finals[method], last = (updates[-1], smooth[:, -1]), max(last, updates[-1])
        middle = np.median(smooth, axis=0)
        # One collapsed seed moves the mean far away from the others, and early values of a critic are wild.
        ranges += [*middle] if key == "kl" else [*np.quantile(middle, [0.02, 1]), *np.quantile(mean, [0.02, 0.98])]
        ends[name_of(method)] = (float(mean[-1]), styles[method].colour)
    low, high = min(ranges), max(ranges)
    room = 0.15 * (high - low or 1)
    ends_of_means = [end for mean in means.values() for end in (mean.min(), mean.max())]
    near = [end for end in ends_of_means if low - 2 * room <= end <= high + 2 * room]  # a little more shows it whole
    low, high = min([low, *near]) - room, max([high, *near]) + room
    axes.set_ylim(low, high)
    axes.set_xlim(0, last)
    if key == "score_mean":
        for method, results in groups.items():
            if any(lost := [collapsed(result) for result in results]):
                end, heights = finals[method]
                heights = np.clip(heights[lost], low, high)
                axes.plot([end] * len(heights), heights, "X", color=styles[method].colour, markersize=7, clip_on=False,
                          zorder=5)  # fmt: skip
    if named:
        label_ends(axes, ends)
    remarks = []
    for method, mean in means.items():
        furthest = float(max(mean, key=lambda value: max(low - value, value - high)))
        if not low <= furthest <= high:
            remarks.append(f"{name_of(method)} leaves the picture: its mean {noun} gets to {plain(furthest)}")
    return remarks


def plain(value: float) -> str:
    """Three digits or all before the point, with a typeset sign.

    >>> plain(90.25), plain(-1234.5), plain(-0.12345)
    ('90.2', '\N{MINUS SIGN}1234', '\N{MINUS SIGN}0.123')
    """
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def draw_estimates(axes: Axes, places: Sequence[float], estimates: Sequence[Estimate], look: Look) -> None:
    """Points with their intervals, joined; an infinite interval is not drawn."""
    heights = [estimate.value for estimate in estimates]
    axes.plot(places, heights, color=look.colour, linestyle=look.dashes, linewidth=1.2)
    axes.plot(places, heights, color=look.colour, marker=look.marker, markersize=6, linestyle="none")
    for place, estimate in zip(places, estimates, strict=True):
        if finite(estimate.low, estimate.high):
            axes.plot([place, place], [estimate.low, estimate.high], color=look.colour, linewidth=1.6)


def draw_row(axes: Axes, row: int, estimate: Estimate, look: Look) -> None:
    """One estimate as a point on a row of its own, with interval and number."""
    if finite(estimate.low, estimate.high):
        axes.plot([estimate.low, estimate.high], [row, row], color=look.colour, linewidth=2)
    axes.plot(estimate.value, row, marker=look.marker, color=look.colour, markersize=7)
    axes.annotate(
        with_interval(estimate), (estimate.value, row), (0, 8), textcoords="offset points", ha="center", fontsize=9,
        color=INK, bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.4, "alpha": 0.85},
    )  # fmt: skip


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names of the rows of `draw_row`, the first on top, and room for their numbers."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.7)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.18)


def scale_to(axes: Axes, means: Sequence[float]) -> None:
    """Limits by the means: the band of a few seeds, one of them collapsed, would flatten everything."""
    low, high = min(means, default=0.0), max(means, default=1.0)
    room = 0.12 * (high - low or 1)
    axes.set_ylim(low - room, high + room)


def scale_to_points(axes: Axes, estimates: Sequence[Estimate]) -> None:
    """Limits by all points and most intervals: a collapsed seed's interval is cut off, or it would fill everything."""
    halves = [high - value for value, low, high in estimates if finite(low, high)]
    room = 2.5 * float(np.median(halves or [0.0]))
    inside = [end for value, low, high in estimates for end in (value, max(low, value - room), min(high, value + room))]
    scale_to(axes, [end for end in inside if finite(end)])
