"""What a pipeline's page draws: scores against the KL, reward models, and how each stage learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tokenmdp.intervals import Estimate
from tokenmdp.report import calibration
from tokenmdp.report.calibration import Bin
from tokenmdp.report.colours import COLOURS, MARKERS
from tokenmdp.report.curves import Metrics, draw_metric
from tokenmdp.report.drawing import dress, error_bars, new_figure
from tokenmdp.report.samples import Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = 3  # in a row


class Policy(NamedTuple):
    """One policy of the pipeline."""

    name: str
    gold: Estimate  # the judge's mean score
    kl: Estimate  # to the start, nats per sequence
    proxy: Estimate | None  # mean score of the reward model that it was trained on
    elo: Estimate | None  # against the policy before
    samples: Sequence[Sample]  # tinted by log policy - log start
    links: Sequence[tuple[str, str]] = ()  # words and path, relative to the page


class RewardModel(NamedTuple):
    """One reward model of the pipeline."""

    round: int
    comparisons: int
    accuracy: Estimate
    ceiling: float | None
    calibration: Sequence[Bin]


class LearningCurves(NamedTuple):
    """How one stage learned."""

    stage: str  # "SFT", "reward model", "policy"
    round: int  # 0: before the first
    metrics: Sequence[str]  # that are drawn
    records: Sequence[Metrics]


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
        line = "-" if label == "judge" else ""  # each round's reward model has a zero of its own
        axes.errorbar(
            places, values, yerr=bars, color=colour, marker="o", capsize=3, linewidth=1.5, linestyle=line, label=label
        )
    for one in policies:
        axes.annotate(
            one.name, (math.sqrt(max(one.kl.value, 0.0)), one.gold.value), xytext=(6, -12), textcoords="offset points",
            fontsize=8.5,
        )  # fmt: skip
    dress(axes, "", "square root of the KL to the start, nats", "mean score")
    axes.legend(frameon=False)
    return figure


def reward_models_figure(models: Sequence[RewardModel]) -> Figure:
    """Held-out accuracy and ceiling by round, and beside it the calibration of those with enough held-out pairs."""
    binned = [one for one in models if one.calibration]
    figure = new_figure(9.6, 3.8)
    left, *rest = figure.subplots(1, 1 + bool(binned), squeeze=False)[0]
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
    for right in rest:
        for one in binned:
            place = one.round + 1  # two colours mean accuracy and ceiling
            calibration.draw(
                right, one.calibration, f"round {one.round}", COLOURS[place % len(COLOURS)],
                MARKERS[place % len(MARKERS)],
            )  # fmt: skip
        dress(right, "", calibration.PREDICTED, calibration.OBSERVED)
        right.legend(frameon=False, loc="upper left")
    return figure


def learning_curves_figure(stages: Sequence[LearningCurves]) -> Figure:
    """A panel for each metric of each kind of stage, and in it a line for each round."""
    panels = list(dict.fromkeys((one.stage, metric) for one in stages for metric in one.metrics))
    rows, columns = math.ceil(len(panels) / PANELS), min(len(panels), PANELS)
    figure = new_figure(3.6 * columns, 3.4 * rows)
    every = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (stage, metric) in zip(every, panels, strict=False):
        runs = {f"round {one.round}": [one.records] for one in stages if one.stage == stage and metric in one.metrics}
        draw_metric(axes, runs, metric)
        dress(axes, stage, "update", axes.get_ylabel())
        if len(runs) > 1:
            axes.legend(frameon=False, fontsize=8)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    return figure
