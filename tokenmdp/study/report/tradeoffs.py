"""Score against its costs: KL, a second reward model, diversity; and whether the gain follows credit quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenmdp.intervals import Estimate
from tokenmdp.report.colours import Look, looks
from tokenmdp.report.drawing import FAINT, INK, PAPER, dress, finite, label_ends, lay_out, new_figure
from tokenmdp.study.equal_kl import equal_kl, pareto_front
from tokenmdp.study.labels import model_name, name_of
from tokenmdp.study.outcomes import BASELINE, Groups, evaluation_curves, last_tenth
from tokenmdp.study.report.lines import (
    KL,
    MOST_RUNS,
    SCORE,
    draw_band,
    draw_curves,
    draw_estimates,
    draw_row,
    draw_runs,
    name_rows,
    scale_to,
)
from tokenmdp.study.statistics import level, mean_difference
from tokenmdp.wording import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PAIRED = 4  # methods that are all compared with one another
GOLD = "score of the second reward model"
DIVERSITY = {
    "distinct_2": ("distinct-2", "share of token pairs that differ"),
    "self_bleu": ("self-BLEU", "how far texts repeat one another"),
    "perplexity": ("log-perplexity", "nats per token, under the reference"),  # one run can be at 4000, others at 30
}


def score_against_kl(settings: Mapping[str, Groups]) -> tuple[Figure, list[str], dict[str, Estimate]]:
    """Where training ended, at several KL coefficients: score against KL with its Pareto front, and at equal KL.

    Args:
        settings: setting (one per KL coefficient) -> method -> seeds.

    Returns:
        The figure, remarks for its caption, and the leads at equal KL by their names in it.
    """
    order = sorted(settings, key=lambda name: coefficient(settings[name]))
    methods = list(dict.fromkeys(method for name in order for method in settings[name]))
    styles = looks(methods)
    figure = new_figure(10.6, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
    dress(left, "where training ended, a point for each KL coefficient", KL, SCORE)
    dress(right, "lead at equal KL", "difference in score")
    points: list[tuple[float, float]] = []
    for method in methods:
        look, held = styles[method], [name for name in order if method in settings[name]]
        columns = [
            [level([last_tenth(result, key) for result in settings[name][method]]) for name in held]
            for key in ("kl", "score_mean")
        ]
        kls, scores = ([estimate.value for estimate in column] for column in columns)
        left.plot(kls, scores, color=look.colour, linestyle=look.dashes, linewidth=1.3)
        left.plot(
            kls, scores, color=look.colour, marker=look.marker, linestyle="none", markersize=6.5, label=name_of(method)
        )
        for kl, score in zip(*columns, strict=True):
            _cross(left, kl, score, look)
        points += zip(kls, scores, strict=True)
        if method == methods[-1]:
            for name, kl, score in zip(held, kls, scores, strict=True):
                left.annotate(
                    f"{coefficient(settings[name]):g}", (kl, score), (5, -11), textcoords="offset points",
                    fontsize=8, color=look.colour,
                    bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
                )  # fmt: skip
    front = [points[place] for place in pareto_front(*zip(*points, strict=True))]
    left.step(*zip(*front, strict=True), where="post", color=FAINT, linewidth=4, alpha=0.25, label="Pareto front")
    remarks = _scale_to_most(left, settings, points)
    left.legend(frameon=False, fontsize=9, labelcolor=INK)
    more, leads = _draw_equal_kl(right, [settings[name] for name in order], methods, styles)
    return figure, [*remarks, *more], leads


def _scale_to_most(axes: Axes, settings: Mapping[str, Groups], points: Sequence[tuple[float, float]]) -> list[str]:
    """Limits by medians over seeds, since one collapsed seed would squeeze all others; says what they leave out."""
    cells = [results for groups in settings.values() for results in groups.values()]
    limits = []
    for key in ("kl", "score_mean"):
        middles = [float(np.median([last_tenth(result, key) for result in results])) for results in cells]
        room = 0.15 * (max(middles) - min(middles) or 1)
        limits.append((min(middles) - room, max(middles) + room))
    outside = sum(any(not low <= at <= high for at, (low, high) in zip(point, limits, strict=True)) for point in points)
    axes.set(xlim=limits[0], ylim=limits[1])
    return [f"Points outside of the picture, drawn out by single seeds: {outside}"] if outside else []


def coefficient(groups: Groups) -> float:
    """The KL coefficient that a setting's cells start with."""
    return float(next(iter(groups.values()))[0].metrics["kl_coef"][0])


def _cross(axes: Axes, across: Estimate, up: Estimate, look: Look) -> None:
    """Intervals in both directions, where there are any."""
    if finite(across.low, across.high):
        axes.plot([across.low, across.high], [up.value] * 2, color=look.colour, linewidth=1, alpha=0.7)
    if finite(up.low, up.high):
        axes.plot([across.value] * 2, [up.low, up.high], color=look.colour, linewidth=1, alpha=0.7)


def _draw_equal_kl(
    axes: Axes, settings: Sequence[Groups], methods: Sequence[str], styles: Mapping[str, Look]
) -> tuple[list[str], dict[str, Estimate]]:
    """A row for each pair of methods, of many only those with the baseline: the lead where both spend the same KL.

    Returns what is left out, in words, and the leads.
    """
    leads: dict[str, Estimate] = {}
    remarks: list[str] = []
    first = sorted(methods, key=lambda method: method != BASELINE)  # the baseline is subtracted
    for other, own in combinations(first, 2):
        both = [groups for groups in settings if own in groups and other in groups]
        if not both or (len(methods) > MOST_PAIRED and other != BASELINE):
            continue
        found = equal_kl([groups[own] for groups in both], [groups[other] for groups in both])
        used, name = len(found.differences), f"{name_of(own)} \N{MINUS SIGN} {name_of(other)}"
        if used:
            lead = mean_difference(found.differences)
            draw_row(axes, len(leads), lead, styles[own])
            leads[name] = lead
        if used < found.seeds or found.collapsed:
            left = f"; {count(found.collapsed, 'collapsed run')} left out" if found.collapsed else ""
            remarks.append(
                f"{name} at equal KL: {used} of {count(found.seeds, 'seed')}, with "
                f"{found.shared:.0%} of their KL in common{left}"
            )
    name_rows(axes, list(leads))
    axes.axvline(0, color=FAINT, linewidth=1)
    if not leads:
        why = "too little KL in common" if remarks else "no pairs to compare"
        axes.text(0.5, 0.6, why, ha="center", color=FAINT, transform=axes.transAxes)
    if len(methods) > MOST_PAIRED:
        remarks.append(f"Of more than {MOST_PAIRED} methods only pairs with {BASELINE} are compared")
    return remarks, leads


def gold_against_kl(groups: Groups) -> tuple[Figure, list[str]]:
    """Both scores against the root of the KL, evaluation by evaluation, and the second one against updates.

    The root is the axis of Gao et al., "Scaling laws for reward model overoptimization" (2023). The evaluation before
    training is left out there, or the way from it would fill the picture.

    Returns:
        The figure, and remarks for its caption.
    """
    styles = looks(list(groups))
    figure = new_figure(12, 4.3)
    panels = figure.subplots(1, 3)
    root = "root of the KL to the reference, nats"
    for axes, title, label, height in zip(
        panels, ("the score trained on", "the second one", "the second one over time"), (root, root, "update"),
        (SCORE, GOLD, GOLD), strict=True,
    ):  # fmt: skip
        dress(axes, title, label, height)
    lay_out(figure)
    ends: tuple[dict[str, tuple[float, str]], ...] = ({}, {}, {})
    means: tuple[list[float], ...] = ([], [], [])
    middles = []
    for method, results in groups.items():
        updates, kls = evaluation_curves(results, "kl")
        trained = updates > 0
        roots = np.sqrt(np.maximum(kls[:, trained], 0))
        middles += [*np.median(roots, axis=0)]
        proxies, golds = (evaluation_curves(results, key)[1] for key in ("score", "gold"))
        drawn = (
            _draw_path(panels[0], roots, proxies[:, trained], styles[method]),
            _draw_path(panels[1], roots, golds[:, trained], styles[method]),
            draw_band(panels[2], updates, golds, styles[method]),
        )
        for mean, every, named in zip(drawn, means, ends, strict=True):
            every += mean.tolist()
            named[name_of(method)] = (float(mean[-1]), styles[method].colour)
        panels[2].set_xlim(0, updates[-1])
    room = 0.15 * (max(middles) - min(middles) or 1)
    limits = (max(min(middles) - room, 0), max(middles) + 2 * room)  # a collapsed run would squeeze all others
    for axes, every, named in zip(panels, means, ends, strict=True):
        scale_to(axes, every)
        if axes is not panels[2]:
            axes.set_xlim(limits)
        label_ends(axes, named)
    last = [result.evaluations["kl"][-1] for results in groups.values() for result in results]
    beyond = sum(kl > limits[1] ** 2 for kl in last)
    return figure, [f"Runs that end beyond the right edge of the first two: {beyond}"] * bool(beyond)


def _draw_path(axes: Axes, across: np.ndarray, up: np.ndarray, look: Look) -> np.ndarray:
    """Each of few runs (R, K) as a thin line, their mean as a thick one with the interval of its last height."""
    if 1 < len(up) <= MOST_RUNS:
        draw_runs(axes, across, up, look)
    end, mean = level(up[:, -1]), up.mean(0)
    axes.plot(across.mean(0), mean, color=look.colour, linestyle=look.dashes, linewidth=2.2, zorder=2.1)
    draw_estimates(axes, [float(across[:, -1].mean())], [end], look)
    return mean


def faithful_study(
    settings: Mapping[str, Groups], quality: Mapping[str, Mapping[str, Any]]
) -> tuple[Figure, list[str]]:
    """A row per reward model: its learning curves, and how far each method's credit agrees with leave-one-out.

    Args:
        settings: reward model -> method -> seeds.
        quality: reward model -> method -> rank correlation as (mean, low, high).

    Returns:
        The figure, and remarks for its caption.
    """
    remarks: list[str] = []
    styles = looks(list(dict.fromkeys(method for groups in settings.values() for method in groups)))
    figure = new_figure(10.6, 3.4 * len(settings) + 0.4)
    panels = figure.subplots(len(settings), 2, width_ratios=[1.6, 1], squeeze=False)
    for place, (left, right) in enumerate(panels):
        last = place == len(panels) - 1
        model = list(settings)[place]
        dress(left, f"reward model {model_name(model)}", "update" if last else "", SCORE)
        dress(right, f"credit quality on {model_name(model)}", "rank correlation with leave-one-out" if last else "")
    lay_out(figure)
    for (model, groups), (left, right) in zip(settings.items(), panels, strict=True):
        remarks += [f"{model_name(model)}: {remark}" for remark in draw_curves(left, groups, styles)]
        rows = [method for method in groups if method in quality.get(model, {})]
        for row, method in enumerate(rows):
            draw_row(right, row, Estimate(*quality[model][method]), styles[method])
        name_rows(right, [name_of(method) for method in rows])
        right.axvline(0, color=FAINT, linewidth=1)
        if not rows:
            right.text(0.5, 0.5, "not measured", ha="center", color=FAINT, transform=right.transAxes)
    shared = [axes.get_xlim() for axes in panels[:, 1]]
    for axes in panels[:, 1]:
        axes.set_xlim(min(low for low, _ in shared), max(high for _, high in shared))
    return figure, remarks


def diversity(groups: Groups) -> Figure:
    """Over training: distinct-2, self-BLEU and log-perplexity under the reference, on held-out prompts."""
    styles = looks(list(groups))
    figure = new_figure(11, 3.9)
    panels = figure.subplots(1, len(DIVERSITY))
    for axes, (title, meaning) in zip(panels, DIVERSITY.values(), strict=True):
        dress(axes, title, "update", meaning)
    lay_out(figure)
    for axes, key in zip(panels, DIVERSITY, strict=True):
        ends, means = {}, []
        for method, results in groups.items():
            look = styles[method]
            updates, values = evaluation_curves(results, key)
            mean = draw_band(axes, updates, np.log(values) if key == "perplexity" else values, look)
            ends[name_of(method)] = (float(mean[-1]), look.colour)
            means += [*mean[np.isfinite(mean)]]
            axes.set_xlim(0, updates[-1])
        scale_to(axes, means)
        label_ends(axes, ends)
    return figure
