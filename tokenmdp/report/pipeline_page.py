"""The page of an RLHF pipeline: one line and some texts per policy, figures, and links to the pages of its runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tokenmdp.files import write_text
from tokenmdp.intervals import Estimate
from tokenmdp.report.colours import COLOURS
from tokenmdp.report.drawing import dress, error_bars, inline, new_figure, theme_colours, write_figure
from tokenmdp.report.heatmap import credit_scale, sample_html
from tokenmdp.report.page import TABLE_STYLE, document
from tokenmdp.report.samples import Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


class Pipeline(NamedTuple):
    """What the page shows."""

    title: str
    note: str
    samples: int  # per policy
    policies: Sequence[Policy]
    reward_models: Sequence[RewardModel]


def write_page(out: str | Path, pipeline: Pipeline) -> Path:
    """Write ``out/report/index.html``, which needs nothing else, and its figures beside it."""
    folder = Path(out) / "report"
    figures = [
        (
            "policies",
            policies_figure(pipeline.policies),
            f"Mean score of the judge{_and_proxy(pipeline)} on {pipeline.samples} responses to held-out prompts, "
            "against the square root of the KL to the start; bars are 95% intervals of the mean. Where the reward "
            "model's score rises and the judge's does not, the policy exploits the reward model.",
        )
    ]
    if pipeline.reward_models:
        figures.append((
            "reward_models",
            reward_models_figure(pipeline.reward_models),
            "Accuracy of each round's reward model on held-out comparisons, with its 95% interval; the line is the "
            "most that labels as noisy as these allow.",
        ))  # fmt: skip
    pictures = "".join(
        f"<figure>{inline(write_figure(figure, folder, name), name, escape(caption))}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for name, figure, caption in figures
    )
    scale = credit_scale([sample.credits for policy in pipeline.policies for sample in policy.samples])
    texts = "".join(
        f"<section><h2>{escape(policy.name)}</h2>{_links(policy.links)}"
        + "".join(sample_html(sample, scale) for sample in policy.samples)
        + "</section>"
        for policy in pipeline.policies
    )
    legend = (
        '<p class="legend">Each token is tinted by how much likelier the policy made it: log policy - log start, nats; '
        '<b class="key up">likelier</b> or <b class="key down">less likely</b>. Times dpo_beta it is the reward that '
        "DPO implies.</p>"
    )
    page = document(
        pipeline.title, pipeline.note, f"<main>{_table(pipeline)}{pictures}{legend}{texts}</main>",
        style=TABLE_STYLE + theme_colours(), scale="common",
    )  # fmt: skip
    path = folder / "index.html"
    write_text(path, page)
    return path


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
    """Held-out accuracy and ceiling by round."""
    figure = new_figure(7.6, 3.6)
    axes = figure.subplots()
    rounds = [one.round for one in models]
    values = [one.accuracy.value for one in models]
    bars = error_bars([one.accuracy for one in models])
    axes.errorbar(rounds, values, yerr=bars, color=COLOURS[0], marker="o", capsize=3, linewidth=1.5, label="accuracy")
    known = [(one.round, one.ceiling) for one in models if one.ceiling is not None]
    if known:
        axes.plot(*zip(*known, strict=True), color=COLOURS[1], marker="_", markersize=14, label="ceiling")
    dress(axes, "", "round", "share of held-out comparisons")
    axes.set_xticks(rounds)
    axes.margins(x=0.2)
    axes.legend(frameon=False)
    return figure


def _table(pipeline: Pipeline) -> str:
    rows = "".join(
        f"<tr><td>{escape(one.name)}</td><td>{one.gold}</td><td>{one.kl}</td><td>{one.proxy or ''}</td>"
        f"<td>{'' if one.elo is None else whole(one.elo)}</td></tr>"
        for one in pipeline.policies
    )
    found = (
        '<div class="wide"><table><tr><th></th><th>judge\'s score</th><th>KL to the start</th>'
        f"<th>reward model's score</th><th>Elo against the one before</th></tr>{rows}</table></div>"
    )
    if pipeline.reward_models:
        lines = "".join(
            f"<tr><td>round {one.round}</td><td>{one.comparisons}</td><td>{one.accuracy}</td>"
            f"<td>{'' if one.ceiling is None else f'{one.ceiling:.2f}'}</td></tr>"
            for one in pipeline.reward_models
        )
        found += (
            '<div class="wide"><table><tr><th>reward model</th><th>comparisons</th><th>accuracy, held out</th>'
            f"<th>at most</th></tr>{lines}</table></div>"
        )
    return found


def _and_proxy(pipeline: Pipeline) -> str:
    return ", and of the reward model that it was trained on," if any(one.proxy for one in pipeline.policies) else ""


def _links(links: Sequence[tuple[str, str]]) -> str:
    if not links:
        return ""
    shown = " · ".join(f'<a href="{escape(path)}">{escape(words)}</a>' for words, path in links)
    return f'<p class="note">{shown}</p>'


def whole(estimate: Estimate) -> str:
    """Elo points need no decimals."""
    interval = f" [{estimate.low:+.0f}, {estimate.high:+.0f}]" if math.isfinite(estimate.low) else ""
    return f"{estimate.value:+.0f}{interval}"
