"""The page of compared behaviour: a figure and a table per measure, against the KL to the start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tokenmdp.files import write_text
from tokenmdp.intervals import Estimate
from tokenmdp.report.colours import looks
from tokenmdp.report.drawing import FAINT, dress, error_bars, inline, new_figure, theme_colours, write_figure
from tokenmdp.report.page import TABLE_STYLE, document

if TYPE_CHECKING:
    from matplotlib.figure import Figure


NOTE = (
    "Means with 95% intervals over questions or responses; the change from the start is taken question by question, or "
    "prompt by prompt. Of one training run each: seeds are not in the intervals."
)


class Measure(NamedTuple):
    """One number of one policy."""

    name: str
    value: Estimate
    change: Estimate | None  # from the start, question by question or prompt by prompt; None of the start itself


class Policy(NamedTuple):
    """One policy; the first one of a page is the start."""

    label: str
    series: str  # those of one series are joined
    kl: Estimate  # to the start, nats per sequence
    measures: tuple[Measure, ...]  # the same ones for every policy


class Comparison(NamedTuple):
    """What the page shows."""

    title: str
    note: str
    policies: Sequence[Policy]
    captions: Mapping[str, str]  # measure -> what it is
    levels: Mapping[str, float]  # measure -> the value of guessing, for those that have one


def write_page(out: str | Path, comparison: Comparison) -> Path:
    """Write ``out/report/index.html``, which needs nothing else, and its figures beside it."""
    folder = Path(out) / "report"
    names = [measure.name for measure in comparison.policies[0].measures]
    pictures = []
    for place, name in enumerate(names):
        file = "".join(mark if mark.isalnum() or mark in "-_" else "-" for mark in name)
        caption = escape(comparison.captions[name])
        svg = write_figure(figure(comparison, place), folder, file)
        pictures.append(
            f"<h2>{escape(name)}</h2><figure>{inline(svg, f'figure{place}', caption)}"
            f"<figcaption>{caption}</figcaption></figure>{_table(comparison, place)}"
        )
    page = document(
        comparison.title, comparison.note, f'<p class="note">{NOTE}</p><main>{"".join(pictures)}</main>',
        style=TABLE_STYLE + theme_colours(),
    )  # fmt: skip
    path = folder / "index.html"
    write_text(path, page)
    return path


def figure(comparison: Comparison, place: int) -> Figure:
    """One measure of all policies against the square root of the KL; every series begins at the start."""
    drawn = new_figure(7.6, 4.4)
    axes = drawn.subplots()
    start, *others = comparison.policies
    name = start.measures[place].name
    if name in comparison.levels:
        axes.axhline(comparison.levels[name], color=FAINT, linewidth=0.9, linestyle=(0, (2, 2)))
    series = list(dict.fromkeys(one.series for one in others))
    for label, look in looks(series).items():
        members = [start, *(one for one in others if one.series == label)]
        places, values, bars = _points(members, place)
        axes.plot(
            places, values, color=look.colour, linestyle=look.dashes, linewidth=1.4, label=label,
            marker=look.marker, markersize=5, markevery=list(range(1, len(places))),
        )  # fmt: skip
        axes.errorbar(
            places[1:], values[1:], yerr=[side[1:] for side in bars], color=look.colour, linestyle="none", capsize=3,
            linewidth=1.1,
        )  # fmt: skip
        for one, x, y in zip(members[1:], places[1:], values[1:], strict=True):
            if one.label != label:
                axes.annotate(
                    one.label, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8, color=look.colour
                )
    places, values, bars = _points([start], place)
    axes.errorbar(
        places, values, yerr=bars, color=FAINT, marker="o", markersize=6, capsize=3, linewidth=1.2, label="start"
    )
    dress(axes, "", "square root of the KL to the start, nats", name)
    axes.margins(x=0.12, y=0.15)
    axes.legend(frameon=False, fontsize=9)
    return drawn


def _points(policies: Sequence[Policy], place: int) -> tuple[list[float], list[float], list[list[float]]]:
    places = [math.sqrt(max(one.kl.value, 0.0)) for one in policies]
    values = [one.measures[place].value for one in policies]
    return places, [one.value for one in values], error_bars(values)


def _table(comparison: Comparison, place: int) -> str:
    measures = [(one, one.measures[place]) for one in comparison.policies]
    rows = "".join(
        f"<tr><td>{escape(shown(one))}</td><td>{one.kl}</td><td>{measure.value}</td>"
        f"<td>{measure.change or ''}</td></tr>"
        for one, measure in measures
    )
    return (
        '<div class="wide"><table><tr><th></th><th>KL to the start</th>'
        f"<th>{escape(measures[0][1].name)}</th><th>change from the start</th></tr>{rows}</table></div>"
    )


def shown(policy: Policy) -> str:
    """Series and label of a policy, once if they are the same.

    >>> shown(Policy("start", "start", Estimate(0, 0, 0), ()))
    'start'
    """
    return policy.label if policy.label == policy.series else f"{policy.series}: {policy.label}"
