"""The page of an RLHF pipeline: one line and some texts per policy, figures, and links to the pages of its runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from tokenmdp.files import write_text
from tokenmdp.intervals import Estimate
from tokenmdp.report.drawing import inline, theme_colours, write_figure
from tokenmdp.report.heatmap import credit_scale, sample_html
from tokenmdp.report.page import TABLE_STYLE, document
from tokenmdp.report.pipeline_figures import (
    LearningCurves,
    Policy,
    RewardModel,
    learning_curves_figure,
    policies_figure,
    reward_models_figure,
)


class Pipeline(NamedTuple):
    """What the page shows."""

    title: str
    note: str
    samples: int  # per policy
    policies: Sequence[Policy]
    reward_models: Sequence[RewardModel]
    curves: Sequence[LearningCurves]


def write_page(out: str | Path, pipeline: Pipeline) -> Path:
    """Write ``out/report/index.html``, which needs nothing else, and its figures beside it."""
    folder = Path(out) / "report"
    figures = [
        (
            "policies",
            policies_figure(pipeline.policies),
            f"Mean score of the judge{_and_proxy(pipeline)} on {pipeline.samples} responses to held-out prompts, "
            "against the square root of the KL to the start; bars are 95% intervals of the mean. Each round's reward "
            "model has a zero of its own, so that its scores are not joined. Where policies move away and the judge's "
            "score falls, they exploit the reward model.",
        )
    ]
    if pipeline.reward_models:
        caption = (
            "Accuracy of each round's reward model on held-out comparisons, with its 95% interval; the line is the "
            "most that labels as noisy as these allow."
        )
        if any(one.calibration for one in pipeline.reward_models):
            caption += (
                " Right: how often the response with the higher score was preferred, against how often the reward "
                "model expects it, in bins of equally many pairs with 95% intervals."
            )
        figures.append(("reward_models", reward_models_figure(pipeline.reward_models), caption))
    figures.append((
        "learning_curves",
        learning_curves_figure(pipeline.curves),
        "How each stage learned; thin, every update; thick, a centred moving average of about a tenth of the updates.",
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
