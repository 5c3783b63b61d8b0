"""``tokenmdp train`` of a policy: from episodes or from data, evaluated in its environment before and after."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from rich.console import Console

from tokenmdp.agents import algorithm
from tokenmdp.agents.learner import Learner
from tokenmdp.agents.policy_data import what_it_reads
from tokenmdp.agents.reward_model import example_of
from tokenmdp.envs.rendering import SEPARATOR
from tokenmdp.evaluation.policies import (
    Evaluation,
    comparison,
    comparison_table,
    evaluate,
    load_evaluation,
    save_evaluation,
)
from tokenmdp.files import make_directory, write_text
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.names import resolve
from tokenmdp.report import curves, heatmap
from tokenmdp.runs.data import read_data, split_data
from tokenmdp.runs.directory import RunDirectory, RunError
from tokenmdp.runs.environments import credit_of, evaluation_envs, make_envs, split_prompts, toy_policy
from tokenmdp.runs.held_out import judged, report_held_out
from tokenmdp.runs.settings import TOY_POLICY, RunSettings, agent_config, settings_record
from tokenmdp.training.accelerated import processes_of
from tokenmdp.training.processes import Processes
from tokenmdp.wording import count

if TYPE_CHECKING:
    from accelerate import Accelerator

SHOWN_SAMPLES = 4  # in the terminal; the page shows all that were kept
CURVES = (
    "score_mean",
    "loss",
    "accuracy",
    "chosen_logratio",
    "rejected_logratio",
    "kl",
    "explained_variance",
    "entropy",
)
OF_EPISODES = ("score_mean", "kl", "explained_variance", "entropy")


class PolicyRun:
    """One run of an algorithm that trains a policy."""

    def __init__(self, settings: RunSettings) -> None:
        self.settings, self.kind = settings, algorithm(settings.algorithm)

    def check(self, updates: int | None, processes: Processes) -> None:
        """Raise ValueError for settings that no run can have, before a directory is made."""
        if self.kind.learns_from == "episodes" and self.settings.num_envs % processes.size:
            raise ValueError(
                f"--num-envs is {self.settings.num_envs}, which {processes.size} processes cannot share equally; "
                f"choose a multiple of {processes.size}"
            )
        self.settings = replace(self.settings, device=str(processes.device(self.settings.device)))
        if self.kind.learns_from != "episodes" and self.settings.data is None:
            raise ValueError(
                f"--data is missing: {self.settings.algorithm} learns from a file, directory or data set; pass one"
            )
        agent_config(self.settings, updates)
        credit_of(self.settings)
        judge, paying = self.settings.judge, self.settings.reward_model
        if (
            judge is not None
            and not processes.rank
            and resolve("reward_model", judge) == resolve("reward_model", paying)
        ):
            warnings.warn(
                f"the judge {judge} is the reward model itself, so its score says nothing that the first "
                "one does not; choose another --judge",
                stacklevel=2,
            )

    def record(self) -> dict[str, Any]:
        """What ``run.json`` holds."""
        return settings_record(self.settings)

    def set_up(
        self, checkpoint: Path | None, updates: int | None, accelerator: Accelerator | None, console: Console
    ) -> Learner:
        """The agent, new or from a checkpoint."""
        settings, processes = self.settings, processes_of(accelerator)
        self.split = split_prompts(settings)
        policy = toy_policy(settings.seed) if settings.policy == TOY_POLICY else settings.policy
        if self.kind.learns_from == "episodes":
            if processes.size > 1:
                console.print(
                    f"{processes.size} processes with {count(settings.num_envs // processes.size, 'episode')} each"
                )
            source: Any = make_envs(settings, settings.num_envs // processes.size, self.split.training)
        else:
            tokenizer = load_tokenizer(settings.tokenizer)
            records = read_data(settings.algorithm, str(settings.data), tokenizer)
            if self.kind.learns_from == "comparisons":  # all: those held out are read in the end
                what_it_reads(policy, tokenizer).check([example_of(one) for one in records], settings.data)
            source, self.held_out = split_data(records, settings.held_out)
            apart = f", {len(self.held_out)} held out" if self.kind.learns_from == "comparisons" else ""
            console.print(
                f"{settings.data}: {count(len(source), 'record')} to learn from{apart}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
        if checkpoint is not None:
            total = {} if updates is None else {"total_updates": updates}
            agent = self.kind.load(checkpoint, source, accelerator=accelerator, device=settings.device, **total)
        else:
            own: dict[str, Any] = {"tokenizer": tokenizer} if self.kind.learns_from != "episodes" else {}
            own["reference"] = settings.reference
            config = agent_config(settings, updates)
            kind: Any = self.kind
            agent = kind(policy, source, config, accelerator=accelerator, **own)
            if settings.policy == TOY_POLICY:
                console.print("the toy policy starts untrained: random weights, random words")
                if agent.config.lora_rank:
                    console.print("adapters learn little on it: the weights beside them stay random")
        console.print(f"{describe(agent)}; {self.split.note}", highlight=False, soft_wrap=True)
        if self.kind.learns_from == "episodes" and (meaning := source.unwrapped.task.reward_model.meaning):
            console.print(f"the score is {meaning}", highlight=False, soft_wrap=True)
        return agent

    def before(self, run: RunDirectory, agent: Learner, console: Console) -> None:
        """Evaluate the policy as it starts; once per run. Unless another reference was given, that is the reference.

        Raises:
            RunError: the evaluation was lost, and the policy has learned since.
        """
        if run.before.exists():
            load_evaluation(run.before)
            return
        own = self.settings.reference is None
        if agent.num_updates_done and not own:
            raise RunError(
                f"{run.before} is missing, and the policy has learned since: nothing tells how it started; restore the "
                "file, or choose another --out"
            )
        with console.status("evaluating the policy before training"):
            save_evaluation(run.before, self._evaluate(agent.reference if own else agent.model, agent))

    @property
    def eval_every(self) -> int:
        """Updates between evaluations as it trains; 0: none."""
        return self.settings.eval_every

    def along(self, run: RunDirectory, agent: Learner, console: Console) -> None:
        """Evaluate the policy as it is now; once for each update."""
        path = run.along(agent.num_updates_done)
        if path.exists():
            return
        make_directory(path.parent)
        point = self._point(agent.num_updates_done, self._evaluate(agent.model, agent, shown=0))
        accuracy = ""
        if self.kind.learns_from == "comparisons" and self.held_out:
            share = judged(agent, self.held_out).table()["accuracy"].value  # type: ignore[arg-type]
            point["held_out_accuracy"], accuracy = share, f", right about {share:.2f} of the held-out pairs"
        write_text(path, json.dumps(point) + "\n")
        gold = f", judge's score {point['gold_mean']:+.2f}" if "gold_mean" in point else ""
        console.print(
            f"update {agent.num_updates_done}, {self.split.label}: score {point['score_mean']:+.2f}{gold}, "
            f"KL {point['kl']:.2f}{accuracy}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip

    @staticmethod
    def _point(update: int, found: Evaluation) -> dict[str, float]:
        point = {"update": update, "score_mean": float(np.mean(found.scores)), "kl": float(np.mean(found.kls))}
        return point | ({"gold_mean": float(np.mean(found.gold))} if found.gold else {})

    def _evaluate(self, policy: Any, agent: Learner, **options: Any) -> Evaluation:
        settings = self.settings
        envs: gym.vector.VectorEnv = evaluation_envs(settings, settings.eval_samples, self.split.held_out)
        task = envs.unwrapped.task  # type: ignore[attr-defined]
        judge = None if settings.judge is None else task.load_reward_model(settings.judge)  # checked, and aligned
        found = evaluate(policy, agent.reference, envs, samples=settings.eval_samples, judge=judge, **options)
        envs.close()
        return found

    def report(self, run: RunDirectory, agent: Learner, console: Console) -> None:
        """Evaluate after training; print the table and samples; write curve, page and summary."""
        settings, split, before = self.settings, self.split, load_evaluation(run.before)
        with console.status("evaluating the policy after training"):
            after = self._evaluate(agent.model, agent)
        save_evaluation(run.path / "after.json", after)
        rows = comparison(before, after)
        summary = {
            "updates": agent.num_updates_done,
            "samples": len(after.scores),
            **{
                name: {key: {"mean": mean, "low": low, "high": high} for key, (mean, low, high) in row.items()}
                for name, row in rows.items()
            },
        }
        records = curves.read_metrics(run.metrics)
        credit = f", {settings.credit} credit" if self.kind.uses_credit else ""
        curve = curves.plot_learning_curves(
            {settings.algorithm: [records]},
            run.report / "learning_curve.png",
            metric=[name for name in (OF_EPISODES if "kl" in records[0] else CURVES) if name in records[0]],
            window=None,
            title=f"{settings.algorithm} on {settings.env}{credit}, seed {settings.seed}",
        )
        note = f"{settings.env}, {split.label}, {agent.num_updates_done} updates, seed {settings.seed}"
        if not self.kind.uses_credit and settings.credit == "sparse":
            note += "; the whole score is shown on the last token, as this algorithm does not use credit"
        if settings.credit == "attention":
            note += f"; the last token also carries {1 - settings.credit_beta:.0%} of the score (1 - credit_beta)"
        page = heatmap.html(
            {"Before training": before.samples, "After training": after.samples},
            run.report / "samples.html",
            title=f"Token credit: {settings.credit}" if self.kind.uses_credit else f"Samples: {settings.algorithm}",
            note=note,
        )
        figures: list[tuple[str, Path]] = []
        done = agent.num_updates_done
        points = [self._point(0, before), *run.points(done), self._point(done, after)]
        if len(points) > 2:
            path = curves.plot_learning_curves(
                {settings.algorithm: [points]},
                run.report / "held_out.png",
                metric=[name for name in ("score_mean", "gold_mean", "kl") if name in points[0]],
                title=f"{settings.algorithm}: {settings.eval_samples} responses to {split.label}, seed {settings.seed}",
            )
            figures.append(("as it trained", path))
        if self.kind.learns_from == "comparisons":
            held_out, more = report_held_out(agent, self.held_out, run.report, console)  # type: ignore[arg-type]
            summary, figures = summary | held_out, figures + more
        # Last, since it says that the report is whole.
        write_text(run.report / "summary.json", json.dumps(summary, indent=2) + "\n")
        print_samples(console, before, after)
        console.print(comparison_table(rows, f"{len(after.scores)} responses to {split.label}"))
        for name, path in (
            ("learning curve", curve),
            *figures,
            ("samples with credit" if self.kind.uses_credit else "samples", page),
            ("metrics", run.metrics),
            ("policy", run.checkpoint),
        ):
            console.print(f"{name}: {path}", highlight=False, soft_wrap=True)


def describe(agent: Learner) -> str:
    """Model, episodes or examples, and precision in a few words."""
    parameters = sum(weight.numel() for weight in agent.model.lm.parameters())
    learned = sum(weight.numel() for weight in agent.model.lm.parameters() if weight.requires_grad)
    adapters = f" ({learned / 1e6:.2f}M of them in adapters, which learn)" if learned < parameters else ""
    values = getattr(agent.model, "value_model", None)
    separate = (
        "" if values is None else f" and a value model of {sum(one.numel() for one in values.parameters()) / 1e6:.2f}M"
    )
    precision = str(agent.model.compute_dtype).removeprefix("torch.")
    return (
        f"{agent.model_name} of {parameters / 1e6:.2f}M parameters{adapters}{separate} in {precision} on "
        f"{agent.model.lm.device}; {agent.batch_words()} per update"
    )


def print_samples(console: Console, before: Evaluation, after: Evaluation) -> None:
    """The first samples before and after, one scale of colour for all."""
    pairs = list(zip(before.samples, after.samples, strict=True))[:SHOWN_SAMPLES]
    scale = heatmap.credit_scale([sample.credits for pair in pairs for sample in pair])
    for pair in pairs:
        console.print()
        for label, sample in zip(("before", "after "), pair, strict=True):
            line = heatmap.terminal(sample.tokens, sample.credits, prompt=sample.prompt + SEPARATOR, scale=scale)
            console.print(f"{label} {sample.score:+6.2f} ", line, sep="", highlight=False, soft_wrap=True)
    console.print()
