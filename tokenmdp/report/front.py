"""A front of two objectives: each policy a mark, its size the KL, and the chord between the ends of a soup."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenmdp.intervals import Estimate
from tokenmdp.report.colours import COLOURS
from tokenmdp.report.drawing import dress, error_bars, new_figure, write_figure


class Mark(NamedTuple):
    """One policy."""

    label: str
    x: Estimate
    y: Estimate
    kl: float  # nats per sequence


def draw(marks: Sequence[Mark], folder: Path, name: str, *, xlabel: str, ylabel: str, title: str = "") -> Path:
    """Write ``name.png`` and ``name.svg``: marks in their order, joined; the chord from the first to the last.

    The area of a mark is proportional to its KL; bars are 95% intervals of the means.
    """
    figure = new_figure(6.4, 5.2)
    axes = figure.subplots()
    first, last = marks[0], marks[-1]
    axes.plot(
        [first.x.value, last.x.value], [first.y.value, last.y.value], color=COLOURS[1], linestyle=":", label="chord"
    )
    xs, ys = [one.x.value for one in marks], [one.y.value for one in marks]
    across, up = error_bars([one.x for one in marks]), error_bars([one.y for one in marks])
    axes.errorbar(xs, ys, xerr=across, yerr=up, color=COLOURS[0], linewidth=1, elinewidth=0.7, capsize=2)
    largest = max(max(one.kl for one in marks), 1e-6)
    axes.scatter(
        xs, ys, s=[20 + 180 * max(one.kl, 0.0) / largest for one in marks], color=COLOURS[0], alpha=0.7, zorder=3
    )
    for one in marks:
        axes.annotate(one.label, (one.x.value, one.y.value), xytext=(8, 6), textcoords="offset points", fontsize=8.5)
    dress(axes, title, xlabel, ylabel)
    axes.legend(frameon=False, title=f"area: KL to the start, up to {largest:.1f} nats", title_fontsize=8.5)
    write_figure(figure, folder, name)
    return folder / f"{name}.png"
