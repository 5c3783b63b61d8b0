"""Score against its costs: KL, a second reward model, diversity; and whether the gain follows credit quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenmdp.intervals import Estimate
from tokenmdp.report.drawing import (
    FAINT,
    INK,
    PAPER,
    Look,
    dress,
    finite,
    label_ends,
    lay_out,
    looks,
    new_figure,
)
from tokenmdp.study.equal_kl import equal_kl, pareto_front
from tokenmdp.study.labels import model_name, name_of
from tokenmdp.study.outcomes import BASELINE, Groups, evaluation_curves, last_tenth
from tokenmdp.study.report.lines import (
    KL,
    SCORE,
    draw_band,
    draw_curves,
    draw_row,
    name_rows,
    scale_to,
)
from tokenmdp.study.statistics import level, mean_difference
from tokenmdp.wording import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GOLD = "score of the second reward model"
DIVERSITY = {
    "distinct_2": ("distinct-2", "share of token pairs that differ"),
    "self_bleu": ("self-BLEU", "how far texts repeat one another"),
    "perplexity": ("log-perplexity", "nats per token, under the reference"),  # one run can be at 4000, others at 30
}


def score_against_kl(settings: Mapping[str, Groups]) -> tuple[Figure, list[str]]:
    """Where training ended, at several KL coefficients: score against KL with its Pareto front, and at equal KL.

    Args:
        settings: setting (one per KL coefficient) -> method -> seeds.

    Returns:
        The figure, and remarks for its caption.
    """
    order = sorted(settings, key=lambda name: coefficient(settings[name]))
    methods = list(dict.fromkeys(method for name in order for method in settings[name]))
    styles = looks(methods)
    figure = new_figure(10.6, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
    dress(left, "where training ended, a point a KL coefficient", KL, SCORE)
    dress(right, f"lead over {BASELINE} at equal KL", "difference in score")
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
    remarks += _draw_equal_kl(right, [settings[name] for name in order], methods, styles)
    return figure, remarks


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
) -> list[str]:
    """A row per method: its lead over the baseline where both spend the same; what is left out, in words."""
    shown: list[str] = []
    remarks: list[str] = []
    for method in methods:
        both = [groups for groups in settings if method in groups and BASELINE in groups]
        if method == BASELINE or not both:
            continue
        found = equal_kl([groups[method] for groups in both], [groups[BASELINE] for groups in both])
        used, name = len(found.differences), name_of(method)
        if used:
            draw_row(axes, len(shown), mean_difference(found.differences), styles[method])
            shown.append(name)
        if used < found.seeds or found.collapsed:
            left = f"; {count(found.collapsed, 'collapsed run')} left out" if found.collapsed else ""
            remarks.append(
                f"{name} against {BASELINE} at equal KL: {used} of {count(found.seeds, 'seed')}, with "
                f"{found.shared:.0%} of their KL in common{left}"
            )
    name_rows(axes, shown)
    axes.axvline(0, color=FAINT, linewidth=1)
    if not shown:
        axes.text(0.5, 0.6, f"too little KL in common with {BASELINE}", ha="center", color=FAINT,
                  transform=axes.transAxes)  # fmt: skip
    return remarks


def gold_against_proxy(groups: Groups) -> Figure:
    """Both scores over training: one against the other with arrows in time, and the second one against updates."""
    styles = looks(list(groups))
    figure = new_figure(10.6, 4.6)
    left, right = figure.subplots(1, 2)
    dress(left, "over training, from the dot on", f"{SCORE} (trained on)", GOLD)
    dress(right, "the second one alone", "update", GOLD)
    lay_out(figure)
    ends, means = {}, []
    for method, results in groups.items():
        look = styles[method]
        updates, proxies = evaluation_curves(results, "score")
        _, golds = evaluation_curves(results, "gold")
        proxy, gold = proxies.mean(0), golds.mean(0)
        left.plot(proxy, gold, color=look.colour, linestyle=look.dashes, linewidth=1.8)
        left.plot(proxy[0], gold[0], marker="o", color=look.colour, markersize=5)
        for place in {1, len(proxy) - 1}:
            start, end = (proxy[place - 1], gold[place - 1]), (proxy[place], gold[place])
            arrow = {"arrowstyle": "-|>", "color": look.colour, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
            left.annotate("", end, start, arrowprops=arrow | {"mutation_scale": 14})
        mean = draw_band(right, updates, golds, look)
        right.plot(updates, mean, color=look.colour, linestyle="none", marker=look.marker, markersize=3.5)
        ends[name_of(method)] = (float(mean[-1]), look.colour)
        means += [*mean]
        right.set_xlim(0, updates[-1])
    scale_to(right, means)
    label_ends(right, ends)
    return figure


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
