"""The learning curves as a PNG: four panels, a mean with a band per engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from learning_parts.protocol import OURS, TRL
from learning_parts.tables import Curves
from tokenmdp.report.colours import COLOURS
from tokenmdp.report.curves import band, smooth
from tokenmdp.wording import count

PANELS = {
    "score": "mean score of the reward model",
    "kl": "KL to the reference, nats per sequence",
    "objective": "objective: score - kl_coef * KL",
    "explained_variance": "explained variance of the returns",
}
LEGEND = {TRL: "TRL 0.11.4", OURS: "tokenmdp"}
SMOOTHED = 5  # updates in the moving average
LOWEST_EXPLAINED = -0.5  # an untrained value function can be far worse than none


def caption(curves: Curves) -> str:
    """A description of the lines and bands.

    >>> caption({"trl": {1: []}, "ours": {1: []}})
    'Mean over 1 seed; moving average over 5 updates.'
    """
    numbers = {name: len(seeds) for name, seeds in curves.items()}
    most = max(numbers.values())
    same = min(numbers.values()) == most
    seeds = count(most, "seed") if same else ", ".join(f"{count(n, 'seed')} ({name})" for name, n in numbers.items())
    spread = "; band: 95% interval of the mean (Student's t)" if most > 1 else ""
    return f"Mean over {seeds}{spread}; moving average over {SMOOTHED} updates."


def draw(curves: Curves, path: Path) -> None:
    """Write the figure of ``curves``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: it would look for a display and keep state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True).flat
    for axes, (key, label) in zip(panels, PANELS.items(), strict=True):
        for colour, (name, seeds) in zip(COLOURS, curves.items(), strict=False):
            lines = np.stack([smooth([record[key] for record in records], SMOOTHED) for records in seeds.values()])
            mean, half = band(lines)
            updates = np.arange(1, len(mean) + 1)
            axes.fill_between(updates, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)
            axes.plot(updates, mean, color=colour, linewidth=2, label=LEGEND.get(name, name))
        axes.set_title(label, fontsize="medium")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if key == "explained_variance":
            axes.set_ylim(bottom=max(axes.get_ylim()[0], LOWEST_EXPLAINED))
        if key in list(PANELS)[2:]:
            axes.set_xlabel("update")
            axes.xaxis.get_major_locator().set_params(integer=True)
        if key == "score":
            axes.legend(frameon=False)
    figure.supxlabel(caption(curves), fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
