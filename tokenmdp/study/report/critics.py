"""The section about the critic: what is left of a method's lead where a critic explains the returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tokenmdp.intervals import Estimate
from tokenmdp.report.colours import looks
from tokenmdp.report.drawing import FAINT, dress, label_ends, lay_out, new_figure, with_interval
from tokenmdp.study.directory import Study
from tokenmdp.study.labels import name_of, slug
from tokenmdp.study.outcomes import BASELINE, CRITIC, Groups, area, critic_of
from tokenmdp.study.report.answers import growth_answer, lead
from tokenmdp.study.report.lines import SCORE, draw_curves, draw_estimates, scale_to_points
from tokenmdp.study.report.parts import Picture, Section, bands_of, caption_remarks, families, lost_runs, seeds_of
from tokenmdp.study.statistics import level

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tokenmdp.study.results import CellResult


def critic_section(study: Study) -> Section:
    """Each method's lead over sparse against the variance that sparse's critic explains, for every grid of critics."""
    section = Section(
        "critic",
        "Is it the credit, or the critic?",
        f"Under {BASELINE} credit the score reaches the tokens only through the critic and GAE's discount by place. So "
        "the same methods are trained with critics that explain the returns to different degrees.",
        missing=f"needs several critics, each with {BASELINE} credit: --critics",
    )
    for grid, found, every in families(study, CRITIC, lambda groups: critic_of(next(iter(groups.values()))[0].cell)):
        settings = {_name(name): groups for name, groups in found.items() if BASELINE in groups}
        if len(settings) < 2:
            continue
        explained = {name: explained_variance(groups[BASELINE]) for name, groups in settings.items()}
        first, *others = sorted(settings, key=lambda name: explained[name].value)
        told = ", ".join(f"{name} {with_interval(explained[name])}" for name in (first, *others))
        caption = (
            f"{' '.join(growth_answer(settings, first, other) for other in others)} Variance of {BASELINE}'s "
            f"returns that its critic explains: {told} (median over the first third of the updates, mean over runs). "
            f"{seeds_of(every)}. Left: lead over {BASELINE} (same critic, same seed) in mean score over training; "
            "right: mean score over training; each with its 95% interval."
            f"{caption_remarks(lost_runs(settings, 'Runs'))}"
        )
        figure = critic_study(settings, explained)
        section.pictures.append(Picture(f"critic-{slug(grid)}", figure, f"grid {grid}: lead by critic", caption))
        figure, remarks = critic_curves(settings, (first, *others))
        caption = (
            f"Above the mean score of an update's episodes, below the variance of the returns that the critic "
            f"explains, a column for each critic. {seeds_of(every)}. {bands_of(every)}"
            f"{caption_remarks([*lost_runs(settings), *remarks])}"
        )
        section.pictures.append(Picture(f"critic-curves-{slug(grid)}", figure, f"grid {grid}: curves", caption))
        section.grids.append(grid)
    return section


def explained_variance(results: Sequence[CellResult]) -> Estimate:
    """What the critic explains in the first third of the updates, over runs.

    Of each run the median over updates, because the first values are erratic.
    """
    curves = [result.metrics["explained_variance"] for result in results]
    return level([float(np.median(curve[: math.ceil(len(curve) / 3)])) for curve in curves])


def critic_study(settings: Mapping[str, Groups], explained: Mapping[str, Estimate]) -> Figure:
    """Lead over sparse, and the mean score over training, against the variance that sparse's critic explains."""
    names = sorted(settings, key=lambda name: explained[name].value)
    styles = looks(list(dict.fromkeys(method for name in names for method in settings[name])))
    figure = new_figure(10.4, 4.3)
    left, right = figure.subplots(1, 2)
    across = f"variance of {BASELINE}'s returns that its critic explains, first third"
    dress(left, f"lead over {BASELINE}, same critic and seeds", across, "difference in mean score")
    dress(right, "the whole of training", across, "mean score over training")
    lay_out(figure)
    left.axhline(0, color=styles[BASELINE].colour, linewidth=1.2)
    ends: tuple[dict[str, tuple[float, str]], ...] = ({}, {})
    drawn: tuple[list[Estimate], ...] = ([], [])
    spread = explained[names[-1]].value - explained[names[0]].value
    for number, (method, look) in enumerate(styles.items()):
        shift = (number - (len(styles) - 1) / 2) * 0.012 * spread
        held = [name for name in names if method in settings[name]]
        leads = {name: lead(settings[name], method) for name in held if method != BASELINE}
        levels = {name: level([area(result) for result in settings[name][method]]) for name in held}
        there = {name: found for name, found in leads.items() if found is not None}
        for axes, estimates, last, every in zip((left, right), (there, levels), ends, drawn, strict=True):
            draw_estimates(axes, [explained[name].value + shift for name in estimates], list(estimates.values()), look)
            every += estimates.values()
            if estimates:
                last[name_of(method)] = (list(estimates.values())[-1].value, look.colour)
    for axes, last, every, free in zip((left, right), ends, drawn, ("top", "bottom"), strict=True):
        scale_to_points(axes, every)
        axes.margins(x=0.08)
        for name in names:
            axes.axvline(explained[name].value, color=FAINT, linewidth=0.6, linestyle=(0, (2, 2)), zorder=1)
            last_one = name == names[-1]
            axes.annotate(
                name, (explained[name].value, float(free == "top")), (2 if last_one else -2, 3 - 6 * (free == "top")),
                xycoords=("data", "axes fraction"), textcoords="offset points", rotation=90,
                ha="left" if last_one else "right", va=free, color=FAINT, fontsize=9,
            )  # fmt: skip
        label_ends(axes, last)
    return figure


def critic_curves(settings: Mapping[str, Groups], names: Sequence[str]) -> tuple[Figure, list[str]]:
    """Score and explained variance over training: a column per critic, in the order of ``names``.

    Returns:
        The figure, and remarks for its caption.
    """
    styles = looks(list(dict.fromkeys(method for name in names for method in settings[name])))
    figure = new_figure(3.7 * len(names), 6.0)
    rows = figure.subplots(2, len(names), sharex=True, sharey="row", squeeze=False)
    for column, name in enumerate(names):
        dress(rows[0, column], name, ylabel=SCORE if column == 0 else "")
        dress(rows[1, column], xlabel="update", ylabel="" if column else "returns explained, 1 is all")
    lay_out(figure)
    remarks: list[str] = []
    for row, (key, noun) in zip(rows, (("score_mean", "score"), ("explained_variance", "explained variance")),
                                strict=True):  # fmt: skip
        limits = []
        for axes, name in zip(row, names, strict=True):
            told = draw_curves(axes, settings[name], styles, key, noun, named=axes is row[-1])
            remarks += [f"{name}: {remark}" for remark in told]
            limits.append(axes.get_ylim())
        row[0].set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    return figure, remarks


def _name(setting: str) -> str:
    """The critic's name in a setting's.

    >>> _name("8-16 tokens, critic=slow, learning_rate=0.0001")
    'slow'
    """
    return setting.rpartition("critic=")[2].partition(",")[0]
