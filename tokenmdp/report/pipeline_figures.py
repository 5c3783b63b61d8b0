"""The figures of a pipeline's page: scores against the KL, reward models, and how each stage learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenmdp.report import calibration
from tokenmdp.report.colours import COLOURS
from tokenmdp.report.curves import LABELS, smooth
from tokenmdp.report.drawing import dress, error_bars, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tokenmdp.report.pipeline_page import Policy, RewardModel, Training

PANELS = 3  # in a row


def policies_figure(policies: Sequence[Policy]) -> Figure:
    """Scores against the square root of the KL."""
    figure = new_figure(7.6, 4.2)
    axes = figure.subplots()
    lines = [("judge", COLOURS[0], [(one.kl, one.gold) for one in policies])]
    lines.append(("reward model", COLOURS[1], [(one.kl, one.proxy) for one in policies if one.proxy is not None]))
    for label, colour, points in lines:
        if not points:
            continue
        places = [math.sqrt(max(kl.value, 0.0)) for kl, _ in points]
        values = [score.value for _, score in points]
        bars = error_bars([score for _, score in points])
        axes.errorbar(places, values, yerr=bars, color=colour, marker="o", capsize=3, linewidth=1.5, label=label)
    for one in policies:
        axes.annotate(
            one.name, (math.sqrt(max(one.kl.value, 0.0)), one.gold.value), xytext=(6, -12), textcoords="offset points",
            fontsize=8.5,
        )  # fmt: skip
    dress(axes, "", "square root of the KL to the start, nats", "mean score")
    axes.legend(frameon=False)
    return figure


def reward_models_figure(models: Sequence[RewardModel]) -> Figure:
    """Held-out accuracy and ceiling by round, and each one's calibration."""
    figure = new_figure(9.6, 3.8)
    left, right = figure.subplots(1, 2)
    rounds = [one.round for one in models]
    values = [one.accuracy.value for one in models]
    bars = error_bars([one.accuracy for one in models])
    left.errorbar(rounds, values, yerr=bars, color=COLOURS[0], marker="o", capsize=3, linewidth=1.5, label="accuracy")
    known = [(one.round, one.ceiling) for one in models if one.ceiling is not None]
    if known:
        left.plot(*zip(*known, strict=True), color=COLOURS[1], marker="_", markersize=14, label="ceiling")
    dress(left, "", "round", "share of held-out comparisons")
    left.set_xticks(rounds)
    left.margins(x=0.2)
    left.legend(frameon=False)
    for number, one in enumerate(models):
        calibration.draw(right, one.calibration, f"round {one.round}", COLOURS[number % len(COLOURS)])
    dress(right, "", calibration.PREDICTED, calibration.OBSERVED)
    right.legend(frameon=False, loc="upper left")
    return figure


def trainings_figure(trainings: Sequence[Training]) -> Figure:
    """A panel for each metric of each kind of stage, and in it a line for each round."""
    panels = list(dict.fromkeys((one.what, metric) for one in trainings for metric in one.curves))
    rows = math.ceil(len(panels) / PANELS)
    figure = new_figure(3.6 * min(len(panels), PANELS), 3.4 * rows)
    every = figure.subplots(rows, min(len(panels), PANELS), squeeze=False).flat
    for axes, (what, metric) in zip(every, panels, strict=False):
        own = [one for one in trainings if one.what == what and metric in one.curves]
        for number, one in enumerate(own):
            values = smooth(one.curves[metric], 1 + len(one.curves[metric]) // 10)
            label = f"round {one.round}" if one.round else None
            axes.plot(range(1, len(values) + 1), values, color=COLOURS[number % len(COLOURS)], label=label)
        dress(axes, what, "update", LABELS.get(metric, metric.replace("_", " ")))
        if len(own) > 1:
            axes.legend(frameon=False, fontsize=8)
    for axes in every:
        axes.set_axis_off()
    return figure
