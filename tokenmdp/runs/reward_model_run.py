"""``tokenmdp train reward-model``: from comparisons to a directory for ``reward_model=``, and how right it is.

The checkpoint is the reward model. The report compares its accuracy on held-out prompts with the ceiling that the
labels' own noise sets, and its predicted probabilities with what was preferred.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tokenmdp.agents.reward_model import RewardModelLearner
from tokenmdp.files import write_text
from tokenmdp.intervals import Estimate, bootstrap_interval
from tokenmdp.models.loading import load_own_tokenizer
from tokenmdp.preferences import Comparison, ceiling, pairs_of, read_preferences
from tokenmdp.report import calibration, curves
from tokenmdp.reward_models.learning import kind_of
from tokenmdp.runs.data import split_data
from tokenmdp.runs.directory import RunDirectory
from tokenmdp.runs.policy_run import describe
from tokenmdp.runs.settings import agent_config
from tokenmdp.training.processes import Processes
from tokenmdp.wording import count

if TYPE_CHECKING:
    from accelerate import Accelerator

NAME = "reward-model"
WORDS = {
    "accuracy": "preferred response scores higher",
    "ceiling": "at most, with labels as noisy as these",
    "order": "in the judge's own order",
}
SMOOTHING = 1 / 10  # share of the updates that each point of the thick curve averages


@dataclass(frozen=True)
class RewardModelSettings:
    """Everything that decides what a run computes; the number of updates is not here."""

    data: str
    policy: str  # what it starts from
    held_out: float
    member: int | None = None  # of an ensemble: it learns from its own bootstrap of the records
    seed: int = 1
    device: str = "cpu"
    algorithm: str = NAME
    config: dict[str, Any] = field(default_factory=dict)  # fields of the configuration but `SET_APART`


class RewardModelRun:
    """One run that trains a reward model."""

    kind = RewardModelLearner

    def __init__(self, settings: RewardModelSettings) -> None:
        self.settings = settings

    def check(self, updates: int | None, processes: Processes) -> None:
        """Raise ValueError for settings that no run can have, before a directory is made."""
        self._config(updates)

    def record(self) -> dict[str, Any]:
        """What ``run.json`` holds."""
        without = {"device"} | ({"member"} if self.settings.member is None else set())
        return {key: value for key, value in asdict(self.settings).items() if key not in without}

    def set_up(
        self, checkpoint: Path | None, updates: int | None, accelerator: Accelerator | None, console: Console
    ) -> RewardModelLearner:
        """The reward model, new or from a checkpoint."""
        settings = self.settings
        records = read_preferences(settings.data, load_own_tokenizer(kind_of(settings.policy), settings.policy))
        training, self.held_out = split_data(records, settings.held_out)
        if settings.member is not None:
            training = bootstrap(training, settings.seed, settings.member)
        console.print(
            f"{settings.data}: {count(len(training), 'record')} to learn from, {len(self.held_out)} held out",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        if checkpoint is None:
            learner = self.kind(settings.policy, training, self._config(updates), accelerator=accelerator)
        else:
            total = {} if updates is None else {"total_updates": updates}
            learner = self.kind.load(checkpoint, training, accelerator=accelerator, device=settings.device, **total)
        console.print(describe(learner), highlight=False, soft_wrap=True)
        return learner

    def before(self, run: RunDirectory, learner: RewardModelLearner, console: Console) -> None:
        """Nothing: a new head's accuracy says nothing."""

    def report(self, run: RunDirectory, learner: RewardModelLearner, console: Console) -> None:
        """Accuracy on held-out prompts beside its ceiling; calibration, curve and summary."""
        records = curves.read_metrics(run.metrics)
        curve = curves.plot_learning_curves(
            {"batches": [records]},
            run.report / "learning_curve.png",
            metric=["loss", "accuracy", "score_gap"],
            window=1 + int(SMOOTHING * len(records)),
            title=f"reward model from {Path(self.settings.data).name}, seed {self.settings.seed}",
        )
        files = [("learning curve", curve)]
        if self.held_out:
            found = judged(learner, self.held_out)
            table = Table(title=f"{count(len(found.gaps), 'held-out pair')}", title_justify="left")
            table.add_column("")
            table.add_column("share of pairs [95% interval]", justify="right")
            for key, number in found.table().items():
                table.add_row(WORDS[key], str(number))
            console.print(table)
            if not learner.utilities:  # whose scores are not log-odds
                plot = calibration.plot(found.gaps, run.report / "calibration.png", learner.config.error_rate)
                files.append(("calibration", plot))
            summary = {
                key: {"value": one.value} if math.isinf(one.low) else one._asdict()
                for key, one in found.table().items()
            }
            write_text(
                run.report / "summary.json",
                json.dumps({"updates": learner.num_updates_done, "pairs": len(found.gaps), **summary}, indent=2) + "\n",
            )
        else:
            console.print("nothing was held out, so there is no accuracy to report (--held-out)")
        for name, path in (*files, ("metrics", run.metrics), ("reward model", run.checkpoint)):
            console.print(f"{name}: {path}", highlight=False, soft_wrap=True)

    def _config(self, updates: int | None) -> Any:
        settings = self.settings
        seed = settings.seed if settings.member is None else settings.seed + 1000 * (1 + settings.member)
        return agent_config(replace(settings, seed=seed), updates)


@dataclass(frozen=True)
class Judged:
    """What a reward model says about held-out pairs."""

    gaps: np.ndarray  # (n,) score of the chosen response less that of the rejected one
    chances: np.ndarray  # (k,) P that the annotator prefers the chosen one, of the pairs that say so
    order: np.ndarray  # (n,) the same difference of the judge's own scores; NaN where there are none

    def table(self) -> dict[str, Estimate]:
        """Accuracy, its ceiling, and how often the judge's own order is met."""
        rows = {"accuracy": bootstrap_interval(_right(self.gaps))}
        if len(self.chances):
            best = ceiling(self.chances)
            rows["ceiling"] = Estimate(best, -math.inf, math.inf)
        known = ~np.isnan(self.order) & (self.order != 0)
        if known.any():
            rows["order"] = bootstrap_interval(_right(self.gaps[known] * np.sign(self.order[known])))
        return rows


def judged(learner: RewardModelLearner, records: Sequence[Any]) -> Judged:
    """Score held-out pairs with the reward model as it is."""
    pairs: list[Comparison] = pairs_of(records)
    scores = learner.score_pairs(pairs)
    order = [
        math.nan if pair.score_chosen is None or pair.score_rejected is None
        else pair.score_chosen - pair.score_rejected
        for pair in pairs
    ]  # fmt: skip
    chances = [pair.probability for pair in pairs if pair.probability is not None]
    return Judged((scores[:, 0] - scores[:, 1]).numpy(), np.array(chances), np.array(order))


def bootstrap(records: Sequence[Any], seed: int, member: int) -> list[Any]:
    """As many records, drawn with replacement; every member has its own draw."""
    drawn = np.random.default_rng((seed, member)).integers(len(records), size=len(records))
    return [records[place] for place in drawn]


def _right(gaps: np.ndarray) -> np.ndarray:
    return (gaps > 0) + (gaps == 0) / 2
