"""Credit quality as a table for the terminal, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from tokenmdp.evaluation.credit_quality import METRICS, MethodQuality, WorldQuality
from tokenmdp.evaluation.credit_quality.ablation import CURVE_STEPS
from tokenmdp.evaluation.credit_quality.counting import BACKWARD
from tokenmdp.evaluation.credit_quality.measure import CONTROLS
from tokenmdp.report.comparison import refusals

FORMAT = "tokenmdp-credit-quality-1"  # of `record`
ONE_LINE, ONE_TABLE = 165, 125  # terminal columns needed to show everything, with intervals beside or below their means
HEADINGS = {
    "spearman": "Spearman",
    "spearman_abs": "Spearman, abs.",
    "auc": "AUC",
    "deletion": "deletion",
    "insertion": "insertion",
}
LEGEND = (
    "Mean over texts [95% bootstrap interval].",
    "Spearman: rank correlation of credit and reference over the tokens of a text; abs.: of their absolute values. "
    "Credit that is equal on all tokens counts as 0.",
    "AUC: how well |credit| finds the top quarter of the tokens by |reference|; .5 is chance.",
    f"deletion, insertion: area between the straight line and the curve of the score when tokens leave (enter) in "
    f"the order of their credit toward the score's sign, in {CURVE_STEPS} steps, over the sum of |reference|; 0 is a "
    "random order, 1/2 the most that a sum of parts allows.",
    "cost: reward-model forwards a text, counted, with the one that scores; a backward pass counts as "
    f"{BACKWARD}; policy: forwards of policies, such as the one that computes the live policy's attention.",
    "reference: the reference itself as credit; random: noise. Credit is taken as delivered, with what a method adds "
    "to the last token so that the sum is the score.",
    "texts: where a method stopped before the last text, how many it covers of how many.",
)


def cost_of(reward_forwards: float, policy_forwards: float) -> str:
    """Forwards per text.

    >>> cost_of(1, 1), cost_of(96.5, 0), cost_of(0, 0)
    ('1 + 1 policy', '96.5', '-')
    """
    policy = f" + {policy_forwards:.3g} policy" if policy_forwards else ""
    return f"{reward_forwards:.4g}{policy}" if reward_forwards else "-"


def cost(method: MethodQuality) -> str:
    """Forwards per text, on average."""
    return cost_of(method.reward_forwards, method.policy_forwards)


def label(name: str, options: Mapping[str, Any]) -> str:
    """The method's name with the options that were given.

    >>> label("shapley", {"budget": 128}), label("red", {})
    ('shapley (budget=128)', 'red')
    """
    return f"{name} ({', '.join(f'{key}={value}' for key, value in options.items())})" if options else name


def quality_tables(result: WorldQuality, labels: Mapping[str, str], width: int) -> list[Table]:
    """One world for a terminal of ``width`` columns: one table, or two that divide the columns between them."""
    if width >= ONE_LINE:
        return [_table(result, labels, METRICS, " ", _title(result))]
    if width >= ONE_TABLE:
        return [_table(result, labels, METRICS, "\n", _title(result))]
    return [_table(result, labels, METRICS[:2], "\n", _title(result)), _table(result, labels, METRICS[2:], "\n", None)]


def _table(
    result: WorldQuality, labels: Mapping[str, str], metrics: Sequence[str], between: str, title: str | None
) -> Table:
    """The given metrics; ``between`` stands between a mean and its interval, and where a name may break."""
    table = Table(title=title, title_justify="left")
    table.add_column("method", overflow="fold", max_width=22 if between == "\n" else None)
    for heading in ("texts", "cost", *(HEADINGS[metric] for metric in metrics)):
        table.add_column(heading, justify="right", overflow="fold")
    for method in result.methods:
        if method.unavailable is None:
            name = labels.get(method.name, method.name).replace(" (", f"{between}(")
            if between == "\n":
                name = name.replace("integrated-", "integrated-\n")
            numbers = [_texts(method, result, between), cost(method).replace(" policy", f"{between}policy")]
            cells = (_interval(method, metric).replace(" ", between, 1) for metric in metrics)
            style = "dim" if method.name in CONTROLS else None
            table.add_row(name, *numbers, *cells, style=style)
    return table


def notes(result: WorldQuality) -> list[str]:
    """Below the table: methods that could not run, or not on all texts, and why; and the verdict on the attention."""
    if result.attention is not None:
        verdict = str(result.attention)
    elif "attention" in result.world.model.provides:
        verdict = "Fewer than two texts have a rank correlation of the attention row with |leave-one-out|."
    else:
        verdict = "The reward model shows no attention."
    return [*method_notes(result.methods), verdict]


def method_notes(methods: Sequence[MethodQuality]) -> list[str]:
    """Methods that could not run, or not on all texts, and why."""
    refused = refusals({method.name: method.unavailable for method in methods if method.unavailable})
    reasons = {method.name: method.stopped for method in methods if method.stopped and method.texts}
    return [*refused, *(f"{name}: the first texts only, because {reason}" for name, reason in reasons.items())]


def markdown(results: Sequence[WorldQuality], labels: Mapping[str, str], command: str) -> str:
    """All worlds as one page."""
    lines = ["# Credit quality", "", f"`{command}`", ""]
    for result in results:
        lines += [f"## {result.world.name}", "", f"{_title(result)}.", f"Reference: {result.world.reference}.", ""]
        lines += [f"| method | texts | cost | {' | '.join(HEADINGS.values())} |"]
        lines += ["|---|" + "---:|" * (2 + len(HEADINGS))]
        for method in result.methods:
            if method.unavailable is None:
                cells = " | ".join(_interval(method, metric) for metric in METRICS)
                first = (labels.get(method.name, method.name), _texts(method, result, " "), cost(method))
                lines.append(f"| {' | '.join(first)} | {cells} |")
        lines += ["", *(f"* {note}" for note in notes(result)), ""]
    return "\n".join([*lines, *(f"* {line}" for line in LEGEND), ""])


def record(results: Sequence[WorldQuality], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as plain data for JSON."""
    return {
        "format": FORMAT,
        "arguments": dict(arguments),
        "worlds": [
            {
                "name": result.world.name,
                "description": result.world.description,
                "reference": result.world.reference,
                "texts": len(result.world.episodes.input_ids),
                "attention": None
                if result.attention is None
                else {"level": result.attention.level, **asdict(result.attention)},
                "methods": [asdict(method) for method in result.methods],
            }
            for result in results
        ],
    }


def _texts(method: MethodQuality, result: WorldQuality, between: str) -> str:
    """The number of texts that the row's means are taken over."""
    every = len(result.world.episodes.input_ids)
    return str(method.texts) if method.texts == every else f"{method.texts}{between}of {every}"


def _title(result: WorldQuality) -> str:
    world = result.world
    lengths = world.episodes.response_mask.sum(-1).double()
    return f"{world.name}: {world.description}; {len(lengths)} texts of {lengths.mean():.1f} tokens on average"


def _interval(method: MethodQuality, metric: str) -> str:
    return str(method.metrics[metric]) if metric in method.metrics else "-"
