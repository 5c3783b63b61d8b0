"""``tokenmdp train reward-model``: from comparisons to a directory for ``reward_model=``, and how right it is.

The checkpoint is the reward model. The report compares its accuracy on held-out prompts with the ceiling that the
labels' own noise sets, and its predicted probabilities with what was preferred.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from tokenmdp.agents.reward_model import RewardModelLearner, example_of, what_it_reads
from tokenmdp.files import write_text
from tokenmdp.models.loading import load_own_tokenizer
from tokenmdp.preferences import read_preferences
from tokenmdp.report import curves
from tokenmdp.reward_models.learning import kind_of
from tokenmdp.runs.data import split_data
from tokenmdp.runs.directory import RunDirectory
from tokenmdp.runs.held_out import report_held_out
from tokenmdp.runs.policy_run import describe
from tokenmdp.runs.settings import agent_config
from tokenmdp.training.processes import Processes
from tokenmdp.wording import count

if TYPE_CHECKING:
    from accelerate import Accelerator

NAME = "reward-model"


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
    eval_every = 0  # its accuracy on batches that it has not seen yet is in the log

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
        config = self._config(updates)
        reads = what_it_reads(settings.policy, config.append_eos)
        reads.check([example_of(one) for one in records], settings.data)  # all: those held out are read in the end
        training, self.held_out = split_data(records, settings.held_out)
        if settings.member is not None:
            training = bootstrap(training, settings.seed, settings.member)
        console.print(
            f"{settings.data}: {count(len(training), 'record')} to learn from, {len(self.held_out)} held out",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        if checkpoint is None:
            learner = self.kind(settings.policy, training, config, accelerator=accelerator)
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
            window=None,
            title=f"reward model from {Path(self.settings.data).name}, seed {self.settings.seed}",
        )
        held_out, figures = report_held_out(learner, self.held_out, run.report, console)
        summary = {"updates": learner.num_updates_done, **held_out}
        write_text(run.report / "summary.json", json.dumps(summary, indent=2) + "\n")
        for name, path in (
            ("learning curve", curve),
            *figures,
            ("metrics", run.metrics),
            ("reward model", run.checkpoint),
        ):
            console.print(f"{name}: {path}", highlight=False, soft_wrap=True)

    def _config(self, updates: int | None) -> Any:
        settings = self.settings
        seed = settings.seed if settings.member is None else settings.seed + 1000 * (1 + settings.member)
        return agent_config(replace(settings, seed=seed), updates)


def bootstrap(records: Sequence[Any], seed: int, member: int) -> list[Any]:
    """As many records, drawn with replacement; every member has its own draw."""
    drawn = np.random.default_rng((seed, member)).integers(len(records), size=len(records))
    return [records[place] for place in drawn]
