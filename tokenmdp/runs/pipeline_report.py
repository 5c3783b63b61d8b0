"""What a pipeline has found: the table of its policies, and what its page shows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from tokenmdp.agents import algorithm
from tokenmdp.evaluation.policies import Evaluation
from tokenmdp.intervals import Estimate, mean_interval
from tokenmdp.preferences import read_records
from tokenmdp.report import pipeline_page
from tokenmdp.report.calibration import Bin
from tokenmdp.report.curves import read_metrics
from tokenmdp.runs.directory import RunDirectory
from tokenmdp.runs.pipeline import PipelineSettings, Stage, runs_of

CURVES = {"SFT": ("loss",), "reward model": ("loss",)}  # metrics that the page draws
POLICY_CURVES = {"episodes": ("score_mean", "kl"), "comparisons": ("loss", "accuracy")}  # by what a policy learns from


def elo(better: Evaluation, worse: Evaluation) -> Estimate:
    """``400 log10(P / (1 - P))``, P the mean of sigma(score - score) over prompts answered by both.

    The interval is that of P's mean over prompts, carried over.

    >>> one, other = (Evaluation(scores=[score, score], kls=[], lengths=[], samples=[]) for score in (1.0, 0.0))
    >>> round(elo(one, other).value)
    174
    """
    gaps = np.subtract(better.scores, worse.scores)
    chances = mean_interval(1 / (1 + np.exp(-gaps)))
    return Estimate(*(400 * math.log10(p / (1 - p)) for p in np.clip(chances, 1e-6, 1 - 1e-6)))


def summary(settings: PipelineSettings, out: Path, stages: Sequence[Stage]) -> pipeline_page.Pipeline:
    """What the page shows of a finished pipeline."""
    runs = {(kind, number): RunDirectory(place) for kind, number, place in runs_of(settings, out)}
    words = "texts tinted by credit" if algorithm(settings.algorithm).uses_credit else "the run of this policy"
    policies, models = [], []
    for number, stage in enumerate(stages):
        found = stage.evaluation
        gain = elo(found, stages[number - 1].evaluation) if number else None
        links = [(words, f"../round-{number}/policy/report/samples.html")] if number else []
        if run := runs.get(("reward model", number)):
            record = json.loads((run.report / "summary.json").read_text(encoding="utf-8"))
            models.append(reward_model_line(number, record, len(read_records(run.path.parent / "comparisons.jsonl"))))
        proxy = mean_interval(found.gold) if found.gold else None
        score, kl = mean_interval(found.scores), mean_interval(found.kls)
        policies.append(pipeline_page.Policy(stage.name, score, kl, proxy, gain, found.samples, links))
    note = (
        f"{settings.policy} trained by {settings.algorithm} on comparisons of {settings.judge}, "
        f"{settings.pairs_per_round} per round, {settings.reference} reference, seed {settings.seed}"
    )
    drawn = CURVES | {"policy": POLICY_CURVES[algorithm(settings.algorithm).learns_from]}
    curves = [
        pipeline_page.LearningCurves(kind, number, drawn[kind], read_metrics(run.metrics))
        for (kind, number), run in runs.items()
    ]
    return pipeline_page.Pipeline("RLHF, round by round", note, settings.eval_samples, policies, models, curves)


def reward_model_line(number: int, record: dict[str, Any], comparisons: int) -> pipeline_page.RewardModel:
    """A reward model's line of the page, from the summary of its run."""
    accuracy = Estimate(**{"low": -math.inf, "high": math.inf, **record["accuracy"]})  # of one pair without interval
    ceiling = record["ceiling"]["value"] if "ceiling" in record else None
    bins = [Bin(one["predicted"], Estimate(**one["observed"]), one["pairs"]) for one in record.get("calibration", [])]
    return pipeline_page.RewardModel(number, comparisons, accuracy, ceiling, bins)


def stage_table(pipeline: pipeline_page.Pipeline) -> Table:
    """One line per policy."""
    table = Table(
        title=f"{pipeline.samples} responses to held-out prompts",
        caption="mean score of judge and reward model [95% interval]; KL to the start in nats per sequence; Elo "
        "against the policy before",
    )
    table.add_column("", no_wrap=True)
    for heading in ("judge", "KL", "reward model", "Elo"):
        table.add_column(heading, justify="right")
    for one in pipeline.policies:
        gain = "" if one.elo is None else pipeline_page.whole(one.elo)
        table.add_row(one.name, str(one.gold), str(one.kl), str(one.proxy or ""), gain)
    return table
