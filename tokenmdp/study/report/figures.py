"""Learning curves of a study: of one setting, over credit_beta, over lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tokenmdp.intervals import Estimate
from tokenmdp.report.colours import Look, looks, ordered_looks
from tokenmdp.report.drawing import FAINT, INK, PAPER, dress, finite, label_ends, lay_out, new_figure
from tokenmdp.study.labels import name_of
from tokenmdp.study.outcomes import BASELINE, Groups, area, curves, length_of, paired, window_for
from tokenmdp.study.report.answers import lead
from tokenmdp.study.report.lines import SCORE, draw_curves, draw_estimates, scale_to_points
from tokenmdp.study.results import CellResult
from tokenmdp.study.statistics import FEWEST_RESAMPLED, level, overtaking

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ARROWS = 3


DIAGNOSTICS = {  # metric -> its panel's title, its unit, what a sentence calls it
    "entropy": ("entropy of the policy", "nats per token", "entropy"),
    "clip_fraction": ("tokens whose ratio was clipped", "share", "share of clipped tokens"),
    "explained_variance": (
        "returns explained by the critic",
        "1 is all of their variance",
        "explained variance of the returns",
    ),
    "attention_mass": ("attention on the response", "mass", "attention on the response"),
    "attention_entropy": ("entropy of the attention credit", "share of its maximum", "entropy of the credit"),
    "credit_fallback": ("episodes without usable attention", "share", "share of episodes without usable attention"),
}


def learning_curves(groups: Groups, *, title: str = "") -> tuple[Figure, list[str]]:
    """Score and KL of one setting's methods, with the share of steps in which sparse's maximum is passed.

    Returns:
        The figure, and remarks for its caption.
    """
    figure = new_figure(9.2, 6.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.1, 1])
    styles = looks(list(groups))
    dress(upper, title, ylabel=SCORE)
    dress(lower, xlabel="update", ylabel="KL, nats a response")
    lay_out(figure)
    remarks = draw_curves(upper, groups, styles)
    remarks += draw_curves(lower, groups, styles, "kl", "KL")
    remarks += _draw_overtaking(upper, groups, styles)
    return figure, remarks


def _draw_overtaking(axes: Axes, groups: Groups, styles: Mapping[str, Look]) -> list[str]:
    """A dotted line at the baseline's maximum, where others pass it, and an arrow from one step to the other.

    Returns remarks on them for the caption.
    """
    found, fewer = {}, False
    for method, results in groups.items():
        pairs = paired(results, groups[BASELINE]) if method != BASELINE and BASELINE in groups else []
        if not pairs:
            continue
        fewer |= len(pairs) < max(len(results), len(groups[BASELINE]))
        updates, own = curves([pair[0] for pair in pairs])
        _, other = curves([pair[1] for pair in pairs])
        steps = min(own.shape[1], other.shape[1])
        found[method] = overtaking(own[:, :steps], other[:, :steps], updates[:steps], window=window_for(steps))
    if not found:
        return []
    main = found.get("attention", next(iter(found.values())))  # others may lack a seed, which moves the maximum
    level, place = main.level, main.baseline_step
    earlier = sorted((passing.step, method) for method, passing in found.items() if passing.share.value < 1)
    shown = [pair for pair in earlier if pair[1] == "attention"]
    shown = sorted([*shown, *(pair for pair in earlier if pair not in shown)][:MOST_ARROWS], reverse=True)
    text = f"{BASELINE}'s maximum {level:.2f} at update {place:.0f}"
    if "attention" in found and found["attention"].share.value >= 1:
        text += f"; {name_of('attention')} does not reach it earlier"
    low, high = axes.get_ylim()
    inches = axes.get_window_extent().height / axes.figure.dpi
    row = 0.29 / inches  # of the axes' height: an arrow with its text
    ceiling = low + (max(high, level) - low) / (1 - row * (len(shown) + 1))
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= max(high, level)])
    axes.set_ylim(low, ceiling)
    lines = {method: ceiling - (ceiling - low) * row * (len(shown) - rank + 0.8) for rank, (_, method) in
             enumerate(shown)}  # fmt: skip
    top = ceiling - (ceiling - low) * row * 0.8
    axes.axhline(level, color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.plot([place, place], [level, top], color=styles[BASELINE].colour, linewidth=0.9)
    axes.plot(place, level, marker="o", color=styles[BASELINE].colour, markersize=6, zorder=4)
    _above(axes, (place, place), top, text, styles[BASELINE].colour)
    for step, method in shown:
        colour = styles[method].colour
        axes.plot(step, found[method].level, marker="o", color=colour, markersize=6, zorder=4)
        axes.plot([step, step], [found[method].level, lines[method]], color=colour, linewidth=0.9)
        arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (step, lines[method]), (place, lines[method]), arrowprops=arrow)
        share = found[method].share
        between = ""
        if finite(share.low):
            between = f" [{share.low:.0%}, {f'{share.high:.0%}' if finite(share.high) else 'never'}]"
            ends = [min(end * found[method].baseline_step, axes.get_xlim()[1]) for end in share[1:]]
            axes.plot(ends, [lines[method]] * 2, color=colour, linewidth=6, alpha=0.25, solid_capstyle="butt")
        text = f"{name_of(method)} is there after {share.value:.0%}{between} of the steps, update {step:.0f}"
        _above(axes, (step, place), lines[method], text, colour)
    intervals = any(finite(found[method].share.low) for _, method in shown)
    remarks = [
        f"The arrows say after what share of {BASELINE}'s steps another method stands where {BASELINE}'s mean curve is "
        + (
            "highest; pale bars and brackets: 95% bootstrap intervals of that share over seeds"
            if intervals
            else f"highest; below {FEWEST_RESAMPLED} seeds they have no interval"
        )
    ] * bool(shown)
    remarks += [
        f"Points and arrows are of the seeds that a method shares with {BASELINE}, fewer than the curves"
    ] * fewer
    return remarks


def _above(axes: Axes, across: tuple[float, float], height: float, text: str, colour: str) -> None:
    """Text above an arrow, on the side that has room."""
    start = across[0] < axes.get_xlim()[1] / 2
    axes.annotate(
        text, (across[0] if start else across[1], height), (0 if start else -3, 2.5), textcoords="offset points",
        ha="left" if start else "right", va="bottom", color=colour, fontsize=9,
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.4, "alpha": 0.85},  # it may cross another's line
    )  # fmt: skip


def beta_sweep(groups: Groups) -> tuple[Figure, list[str]]:
    """Curves of one method over its credit_beta, and the mean score over training against it; remarks for a caption."""
    order = sorted(groups, key=lambda method: groups[method][0].cell.settings.credit_beta)
    betas = [groups[method][0].cell.settings.credit_beta for method in order]
    figure = new_figure(10.4, 4.1)
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    dress(left, "learning curves", "update", SCORE)
    dress(right, "the whole of training", "credit_beta (0 is sparse credit)", "mean score over training")
    lay_out(figure)
    styles = {f"{beta:g}": look for beta, look in zip(betas, ordered_looks(len(betas)), strict=True)}
    curved = dict(zip(styles, (groups[method] for method in order), strict=True))
    remarks = [f"credit_beta {remark}" for remark in draw_curves(left, curved, styles, named=False)]
    for name, look in styles.items():
        left.plot([], [], color=look.colour, linestyle=look.dashes, linewidth=2.2, label=name)
    legend = left.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right", title="credit_beta")
    legend.get_title().set_color(INK)
    for beta, look, method in zip(betas, styles.values(), order, strict=True):
        draw_estimates(right, [beta], [_area(groups[method])], look)
    right.set_xticks(betas)
    return figure, remarks


def length_study(settings: Mapping[str, Groups]) -> tuple[Figure, list[str]]:
    """Curves per length, the mean score over training against length, and the lead over sparse of the same seed.

    Returns:
        The figure, and remarks for its caption.
    """
    names = sorted(settings, key=lambda name: length_of(next(iter(settings[name].values()))[0].cell))
    styles = looks(list(dict.fromkeys(method for name in names for method in settings[name])))
    figure = new_figure(11, 7.6)
    panels = figure.add_gridspec(2, 1, height_ratios=[1.15, 1])
    upper = panels[0].subgridspec(1, len(names)).subplots(squeeze=False)[0]
    for axes, name in zip(upper, names, strict=True):
        dress(axes, name, "update", SCORE if axes is upper[0] else "")
    left, right = panels[1].subgridspec(1, 2).subplots(squeeze=False)[0]
    dress(left, "the whole of training", "response length, tokens", "mean score over training")
    dress(right, f"lead over {BASELINE}, same seeds", "response length, tokens", "difference in mean score")
    lay_out(figure)
    remarks = [
        f"{name}: {remark}"
        for axes, name in zip(upper, names, strict=True)
        for remark in draw_curves(axes, settings[name], styles)
    ]
    right.axhline(0, color=styles[BASELINE].colour if BASELINE in styles else FAINT, linewidth=1.2)
    ends: tuple[dict[str, tuple[float, str]], ...] = ({}, {})
    drawn: tuple[list[Estimate], ...] = ([], [])
    for number, (method, look) in enumerate(styles.items()):
        shift = (number - (len(styles) - 1) / 2) * 0.075
        held = [place for place, name in enumerate(names) if method in settings[name]]
        levels = {place: _area(settings[names[place]][method]) for place in held}
        leads = {place: lead(settings[names[place]], method) for place in held if method != BASELINE}
        there = {place: found for place, found in leads.items() if found is not None}
        for axes, estimates, last, every in zip((left, right), (levels, there), ends, drawn, strict=True):
            draw_estimates(axes, [place + shift for place in estimates], list(estimates.values()), look)
            every += estimates.values()
            if estimates:
                last[name_of(method)] = (list(estimates.values())[-1].value, look.colour)
    if not ends[1]:
        right.text(0.5, 0.6, f"no run with {BASELINE} credit", ha="center", color=FAINT, transform=right.transAxes)
    for axes, last, every in zip((left, right), ends, drawn, strict=True):
        scale_to_points(axes, every)
        axes.set_xticks(range(len(names)), [name.removesuffix(" tokens") for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
        label_ends(axes, last)
    return figure, remarks


def _area(results: Sequence[CellResult]) -> Estimate:
    return level([area(result) for result in results])


def diagnostics(groups: Groups) -> tuple[Figure, list[str]]:
    """Diagnostics of training: a panel per metric of `DIAGNOSTICS`, with the methods that record it.

    Returns:
        The figure, and remarks for its caption.
    """
    styles = looks(list(groups))
    remarks, shown = [], {}
    for key, (title, *_) in DIAGNOSTICS.items():
        held = {method: cells for method, cells in groups.items() if all(key in cell.metrics for cell in cells)}
        if any(any(cell.metrics[key]) for cells in held.values() for cell in cells):
            shown[key] = held
        elif held:
            remarks.append(f"Not drawn, 0 throughout: {title}")
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    figure = new_figure(3.7 * columns, 3.2 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for key, axes in zip(shown, panels, strict=False):
        dress(axes, DIAGNOSTICS[key][0], "update", DIAGNOSTICS[key][1])
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    lay_out(figure)
    for (key, held), axes in zip(shown.items(), panels, strict=False):
        remarks += draw_curves(axes, held, styles, key, DIAGNOSTICS[key][2])
    return figure, remarks
