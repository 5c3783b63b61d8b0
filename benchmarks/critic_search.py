"""Which critic learns? Variants of PPO's value function on the bundled models, and what each of them buys.

    python benchmarks/critic_search.py --out runs/critic              # every variant and task
    python benchmarks/critic_search.py --out runs/critic --tasks short --updates 60 --variants random
    python benchmarks/critic_search.py --out runs/critic --table      # of what is there

One process and one thread per run, two runs side by side. A finished run is not run again, so an interrupted search
goes on where it stopped. A variant is a setting of `PPOConfig`, or a subclass of PPO below; those that lost stay here.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import nn

import tokenmdp  # noqa: F401  (registers the ids)
from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.credit import make_credit
from tokenmdp.files import write_text
from tokenmdp.intervals import mean_interval
from tokenmdp.losses import clipped_value_loss
from tokenmdp.runs.process_settings import SETTINGS
from tokenmdp.study.directory import load_study
from tokenmdp.study.equal_kl import scores_in_bins
from tokenmdp.types import Rollout
from tokenmdp.wrappers import vector

# Episodes per update, lengths, and the protocol: PPOConfig's defaults, or the study's (docs/study.md).
STUDY = {"learning_rate": 1e-4, "kl_coef": 0.2, "kl_target": 6.0, "num_minibatches": 1}
TASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "main": ({"num_envs": 64}, {"learning_rate": 3e-5, "kl_coef": 0.3}),
    "short": ({"num_envs": 16, "max_new_tokens": 15, "min_new_tokens": 8, "horizon_range": (8, 15)}, STUDY),
    "long": ({"num_envs": 16, "max_new_tokens": 59, "min_new_tokens": 40, "horizon_range": (40, 59)}, STUDY),
}
EQUAL_KL = (9.0, 12.0)  # nats per sequence
UPDATES = {"main": 60, "short": 120, "long": 120}


class Trial(PPO):
    """PPO with what a variant changes; `VARIANTS` has them."""

    def __init__(self, *arguments: Any, variant: dict[str, Any], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.variant, head, config = variant, self.policy.value_head, self.config
        torch.manual_seed(config.seed)
        if std := variant.get("random"):
            nn.init.normal_(head.weight, std=std / math.sqrt(head.in_features))
        if variant.get("normalised"):
            self.policy.value_head = NormalisedHead(head)
        if variant.get("trunk"):
            self.critic = copy.deepcopy(self.policy)
            self.critic.requires_grad_(True)
            nn.init.normal_(self.critic.value_head.weight, std=1 / math.sqrt(head.in_features))
            self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=variant["trunk"])
        if not variant.get("clipped apart"):
            self.processes = ClippedTogether(self)

    def _schedule(self) -> float:
        rate = super()._schedule()
        if self.num_updates_done < self.variant.get("warmup", 0):
            self.optimizer.param_groups[0]["lr"] = 0.0
        return rate

    def _advantages(self, rollout: Rollout, penalties: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if "trunk" in self.variant:
            with torch.no_grad():
                read = self.critic.evaluate(rollout.input_ids, rollout.attention_mask, rollout.prompt_slots)
                rollout.values.copy_(read.values * rollout.response_mask)
        if self.variant.get("bias") and self.num_updates_done == 0:
            with torch.no_grad():
                self.policy.value_head.bias.fill_(rollout.scores.mean())
            rollout.values.add_(rollout.scores.mean() * rollout.response_mask)
        advantages, returns = super()._advantages(rollout, penalties)
        if "trunk" in self.variant:
            self._learn_apart(rollout, returns)
        if self.variant.get("normalised"):
            self.policy.value_head.follow(returns[rollout.response_mask])
        return advantages, returns

    def _learn_apart(self, rollout: Rollout, returns: torch.Tensor) -> None:
        for rows in self._minibatches(len(rollout.scores)):
            self.critic_optimizer.zero_grad()
            texts, seen = rollout.input_ids[rows], rollout.attention_mask[rows]
            values = self.critic.evaluate(texts, seen, rollout.prompt_slots).values
            clipped_value_loss(values, values, returns[rows], rollout.response_mask[rows], None).backward()
            nn.utils.clip_grad_norm_(self.critic.parameters(), 1.0)
            self.critic_optimizer.step()


class NormalisedHead(nn.Module):
    """``mean + std * head(h)`` with running moments of the returns (half-life about seven updates)."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("square", torch.ones(()))

    def follow(self, returns: torch.Tensor) -> None:  # noqa: D102
        self.mean.lerp_(returns.mean(), 0.1)
        self.square.lerp_(returns.square().mean(), 0.1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.mean + (self.square - self.mean.square()).clamp(min=1e-4).sqrt() * self.head(hidden)


class ClippedTogether:
    """The run's `Processes` with one gradient norm over language model and head."""

    def __init__(self, agent: PPO) -> None:
        self.agent, self.real = agent, agent.processes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def clip_grad_norm(self, parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:  # noqa: D102
        if parameters is self.agent.optimizer.param_groups[0]["params"]:  # the first of the two calls
            return self.real.clip_grad_norm(list(self.agent.policy.parameters()), max_norm)
        return self.real.clip_grad_norm(parameters, math.inf)


SAME = -1.0  # the head learns at the policy's rate
VARIANTS: dict[str, dict[str, Any]] = {
    "zero": {"rate": SAME},  # of the first edition of the study
    "zero, 3e-4": {"rate": 3e-4},
    "zero, 1e-3": {"rate": 1e-3},
    "zero, 3e-3": {"rate": 3e-3},
    "zero, 1e-2": {"rate": 1e-2},
    "zero, 3e-3, clipped apart": {"rate": 3e-3, "clipped apart": True},  # what PPOConfig's defaults are
    "zero, 3e-3, clipped apart, bias": {"rate": 3e-3, "clipped apart": True, "bias": True},  # at the first mean score
    "zero, 3e-3, warm-up of 3": {"rate": 3e-3, "warmup": 3},
    "random small": {"rate": SAME, "random": 0.577},  # as wide as nn.Linear's own initialisation, which TRL has
    "random": {"rate": SAME, "random": 1.0},
    "random, 1e-3": {"rate": 1e-3, "random": 1.0},
    "random, 3e-3": {"rate": 3e-3, "random": 1.0},
    "random, 1e-3, clipped apart": {"rate": 1e-3, "random": 1.0, "clipped apart": True},
    "random, vf_coef 0.5": {"rate": SAME, "random": 1.0, "config": {"vf_coef": 0.5}},
    "random, 1e-3, vf_coef 0.5": {"rate": 1e-3, "random": 1.0, "config": {"vf_coef": 0.5}},
    "random, 1e-3, no value clipping": {"rate": 1e-3, "random": 1.0, "config": {"clip_coef_value": None}},
    "random, returns normalised": {"rate": SAME, "random": 1.0, "normalised": True},
    "separate value model": {"rate": 3e-3, "clipped apart": True, "config": {"value_model": "separate"}},
    "own trunk, 1e-4": {"rate": SAME, "trunk": 1e-4, "config": {"vf_coef": 0.0}},
}


def run(task: str, credit: str, variant: str, seed: int, updates: int) -> dict[str, Any]:
    """Train one run; returns its history and costs."""
    torch.set_num_threads(1)
    env, config = TASKS[task]
    options = VARIANTS[variant]
    envs = gym.make_vec("TextGen-IMDb-v0", autoreset_mode="Disabled", score_when="all_done", **env)
    envs = vector.CreditReward(envs, make_credit(credit))
    rate = config["learning_rate"] if options["rate"] == SAME else options["rate"]
    config = PPOConfig(**config | options.get("config", {}), vf_learning_rate=rate, seed=seed)
    agent, started = Trial("imdb-tiny", envs, config, variant=options), time.perf_counter()
    agent.learn(updates)
    keys = ("score_mean", "kl", "explained_variance", "value_loss", "entropy", "grad_norm", "approx_kl")
    columns = {key: [round(record[key], 4) for record in agent.history] for key in keys}
    return {
        "task": task, "credit": credit, "variant": variant, "seed": seed, "updates": updates, "kl_coef": config.kl_coef,
        "seconds": time.perf_counter() - started, "history": columns,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, two at a time; or, with ``--table``, print the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--credits", nargs="+", default=["sparse"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--updates", type=int, help="default: 60 of main, 120 of the others")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and run nothing")
    parser.add_argument("--first-edition", type=Path, metavar="STUDY", help="with --table: docs/study_results, too")
    parser.add_argument("--cell", action="store_true", help="run one, in this process")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.table:
        records = [json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))]
        print(table(records + (first_edition(args.first_edition) if args.first_edition else [])))
        return
    cells = [
        (task, credit, variant, seed)
        for seed in args.seeds for task in args.tasks for credit in args.credits for variant in args.variants
    ]  # fmt: skip
    if args.cell:
        ((task, credit, variant, seed),) = cells
        result = run(task, credit, variant, seed, args.updates or UPDATES[task])
        write_text(cell_path(args.out, *cells[0], result["updates"]), json.dumps(result))
        return
    waiting = [cell for cell in cells if not cell_path(args.out, *cell, args.updates or UPDATES[cell[0]]).exists()]
    failed = 0
    running: list[subprocess.Popen[bytes]] = []
    environment = os.environ | SETTINGS | {"OMP_NUM_THREADS": "1"}
    while waiting or running:
        failed += sum(bool(process.poll()) for process in running)
        running = [process for process in running if process.poll() is None]
        while waiting and len(running) < args.jobs:
            task, credit, variant, seed = waiting.pop(0)
            command = [
                sys.executable, __file__, "--cell", "--out", args.out, "--tasks", task, "--credits", credit,
                "--variants", variant, "--seeds", str(seed),
            ]  # fmt: skip
            if args.updates:
                command += ["--updates", str(args.updates)]
            running.append(subprocess.Popen(command, env=environment))
            print(f"{task}, {credit}, {variant}, seed {seed}", flush=True)
        time.sleep(0.5)
    if failed:
        sys.exit(f"{failed} runs failed; what they printed stands above. The same command runs them again")


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a line per task, credit, variant and number of updates, with means over its seeds.

    The objective is ``score - kl_coef * KL`` with the initial ``kl_coef``. The score at equal KL is the mean over the
    updates of a run whose KL lies in `EQUAL_KL`, then over runs. Intervals are 95%, Student's t, over runs.
    """
    groups: dict[tuple[str, str, str, int], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["task"], record["credit"], record["variant"], record["updates"]), []).append(record)
    low, high = EQUAL_KL
    lines = [
        f"| task | credit | critic | runs x updates | mean score | score at {low:g} to {high:g} nats | "
        "last quarter: score | KL | objective | runs lost | explained variance by quarter |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = list(VARIANTS)
    for (task, credit, variant, updates), runs in sorted(
        groups.items(), key=lambda item: (item[0][:2], order.index(item[0][2]))
    ):
        columns = {key: np.array([run["history"][key] for run in runs]) for key in runs[0]["history"]}  # (R, K) each
        score, kl, explained = columns["score_mean"], columns["kl"], columns["explained_variance"]
        last = slice(updates - updates // 4, None)
        near = scores_in_bins(kl, score, EQUAL_KL)
        equal = np.nanmean(near) if np.isfinite(near).any() else math.nan
        objective = score[:, last].mean() - runs[0]["kl_coef"] * kl[:, last].mean()
        quarters = ", ".join(f"{part.mean():.2f}" for part in np.array_split(explained, 4, axis=1))
        lines.append(
            f"| {task} | {credit} | {variant} | {len(runs)} x {updates} | {over_runs(score)} | {equal:.2f} | "
            f"{over_runs(score[:, last])} | {kl[:, last].mean():.1f} | {objective:.2f} | {lost(score)} | {quarters} |"
        )
    return "\n".join(lines)


def over_runs(scores: np.ndarray) -> str:
    """The mean of each run (R, K) as an interval over runs; one run has none."""
    means = scores.mean(1)
    return str(mean_interval(means)) if len(means) > 1 else f"{means[0]:.2f}"


def lost(scores: np.ndarray, window: int = 10) -> int:
    """How many runs (R, K) end with a moving average below half of their best one."""
    averages = np.lib.stride_tricks.sliding_window_view(scores, min(window, scores.shape[1]), axis=1).mean(-1)
    return int((averages[:, -1] < averages.max(1) / 2).sum())


def first_edition(study: Path) -> list[dict[str, Any]]:
    """The first edition's runs of the same tasks as records, cut to as many updates as a run of this search has."""
    lengths = {env["horizon_range"]: task for task, (env, _) in TASKS.items() if "horizon_range" in env}
    results = load_study(study).results
    records = []
    for settings, metrics in ((results[id].cell.settings, results[id].metrics) for id in sorted(results)):
        credit, task = settings.credit, lengths.get(settings.horizon_range)
        same = settings.num_envs == 16 and settings.reward_model == "imdb-tiny" and not settings.credit_options
        same = same and settings.credit_beta in (0.8, 1.0 if credit == "red" else 0.8)
        if task is None or not same or any(settings.config.get(key) != value for key, value in STUDY.items()):
            continue
        history = {key: metrics[key][: UPDATES[task]] for key in ("score_mean", "kl", "explained_variance")}
        records.append(
            {
                "task": task, "credit": credit, "variant": "zero", "seed": settings.seed,
                "updates": len(history["kl"]), "kl_coef": settings.config["kl_coef"], "history": history,
            }
        )  # fmt: skip
    return records


def cell_path(out: Path, task: str, credit: str, variant: str, seed: int, updates: int) -> Path:
    """The file of a run's record."""
    return out / f"{task}-{credit}-{variant.replace(', ', '_').replace(' ', '-')}-{updates}-{seed}.json"


if __name__ == "__main__":
    main()
