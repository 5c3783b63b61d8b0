"""Does asking pay? The judge's score of PPO on reward models learned from 100 to 1,000 comparisons, asked in four ways.

    python benchmarks/asking.py --out runs/asking               # all that is missing; interrupt it and run it again
    python benchmarks/asking.py --out runs/asking --table       # of what is there

Every reward model is an ensemble on bootstraps of its comparisons, which `imdb-gold` made at temperature 1.

random          all comparisons at once, of random pairs of the start policy's responses
disagreement    half of them like that; the other half where an ensemble of the first half disagrees most, one of four
fresh           a third of the comparisons before each third of the training, of the policy as it is by then
penalty         as random; the policy is trained on the members' mean less one of their sds

All arms make the same number of PPO updates. The policy is measured on held-out prompts as it trains.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from shares import add_part, make_missing

from tokenmdp.agents.ppo import PPO
from tokenmdp.agents.reward_model import RewardModelConfig, RewardModelLearner
from tokenmdp.evaluation.policies import evaluate
from tokenmdp.files import make_directory, write_text
from tokenmdp.intervals import mean_interval
from tokenmdp.models.tokens import distinct_n
from tokenmdp.preferences import Preference, pairs_of
from tokenmdp.report.colours import COLOURS, MARKERS
from tokenmdp.report.drawing import dress, new_figure, write_figure
from tokenmdp.reward_models import EnsembleRewardModel, load_reward_model
from tokenmdp.reward_models.ensemble import write_ensemble
from tokenmdp.runs.comparisons import Comparing, ask_model
from tokenmdp.runs.directory import claim
from tokenmdp.runs.environments import evaluation_envs, make_envs, split_prompts
from tokenmdp.runs.reward_model_run import bootstrap
from tokenmdp.runs.settings import agent_config, preset_settings
from tokenmdp.types import lay_out

POLICY, JUDGE = "imdb-tiny", "imdb-gold"
MEMBER_NAMES, PENALTY, ROUNDS = ("member-0", "member-1", "member-2"), 1.0, 3
SAMPLES = 256  # texts per measurement
JUDGED = 1000  # pairs that no reward model learns from


class Cell(NamedTuple):
    """One run."""

    arm: str
    labels: int
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.arm}-{self.labels}-seed{self.seed}"


CELLS = (
    *(("random", labels) for labels in (100, 300, 1000)),
    *((arm, 300) for arm in ("disagreement", "fresh", "penalty")),
)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--updates", type=int, default=45, help="of PPO, divisible by 3")
parser.add_argument("--every", type=int, default=5, help="updates between two measurements")
parser.add_argument("--kl-coef", type=float, default=0.1, help="low, so that the reward model can be over-optimised")
parser.add_argument("--epochs", type=int, default=15, help="of a reward model with 100 comparisons; more have fewer")
add_part(parser)
parser.add_argument("--table", action="store_true", help="only report what is there")


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    if args.updates % ROUNDS:
        parser.error(f"--updates {args.updates} does not divide into {ROUNDS} rounds")
    if not args.table:
        numbers = {name: getattr(args, name) for name in ("updates", "every", "kl_coef", "epochs")}
        claim(args.out / "settings.json", "measurements", numbers)
        todo = [Cell(arm, labels, seed) for seed in range(1, args.seeds + 1) for arm, labels in CELLS]
        for cell in todo[args.part]:
            make_missing(args.out / f"{cell.name}.json", partial(run, cell, args))
    report(args.out, args.seeds)


def run(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """The comparisons, the ensembles and PPO of one cell; what was measured on the way."""
    own, policy, records, points, accuracies = args.out / cell.name, POLICY, [], [], []
    rounds = ROUNDS if cell.arm == "fresh" else 1
    for number in range(rounds):
        first, last = (cell.labels * end // rounds for end in (number, number + 1))
        place = own / f"round-{number}"
        make_directory(place)
        records += comparisons(place, policy, last - first, cell, number, args)
        accuracies.append(order_met(ensemble(place, records, cell, args), args.out))
        if cell.arm == "penalty":
            write_ensemble(place, MEMBER_NAMES, PENALTY)
        agent = train(policy, place, cell.seed + 1000 * number, args.updates // rounds, args, points)
        policy = str(place / "policy")
        agent.save(policy)
    return {"points": points, "accuracy": accuracies}


def comparisons(
    place: Path, policy: str, labels: int, cell: Cell, number: int, args: argparse.Namespace
) -> list[Preference]:
    """New ones of a policy's responses."""
    seed = cell.seed + 1000 * number
    if cell.arm != "disagreement":
        return ask(place / "pairs.jsonl", policy, labels, seed)
    first = ask(place / "pairs.jsonl", policy, labels // 2, seed)
    make_directory(place / "first")
    ensemble(place / "first", first, cell, args)
    return first + ask(
        place / "chosen.jsonl",
        policy,
        labels - labels // 2,
        seed,
        ask_by="disagreement",
        ask_model=str(place / "first"),
    )


def ask(path: Path, policy: str, pairs: int, seed: int, **options: Any) -> list[Preference]:
    """``pairs`` comparisons of responses that a policy samples."""
    asked = Comparing(policy=policy, out=path, judge=JUDGE, pairs=pairs, seed=seed, max_new_tokens=16, **options)
    return ask_model(Console(file=io.StringIO()), asked)


def ensemble(place: Path, records: list[Preference], cell: Cell, args: argparse.Namespace) -> EnsembleRewardModel:
    """Train what is missing of the members, each on its bootstrap."""
    for member, name in enumerate(MEMBER_NAMES):
        if not (place / name).exists():
            config = RewardModelConfig(
                batch_size=16, epochs=max(2, round(args.epochs * (100 / len(records)) ** 0.75)), unit_scale=True,
                seed=cell.seed + 1000 * (1 + member), device="cpu",
            )  # fmt: skip
            learner = RewardModelLearner(POLICY, bootstrap(records, cell.seed, member), config)
            learner.learn(learner.config.total_updates)
            learner.save(place / name)
    write_ensemble(place, MEMBER_NAMES)
    model = load_reward_model(str(place))
    assert isinstance(model, EnsembleRewardModel)
    return model


def order_met(model: EnsembleRewardModel, out: Path) -> float:
    """In what share of pairs that no model learned from it prefers the response that the judge itself scores higher."""
    pairs = pairs_of(ask(out / "held-out.jsonl", POLICY, JUDGED, 10_000))
    prompts = [pair.prompt_ids for pair in pairs for _ in range(2)]
    responses = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    scores = model.member_scores(lay_out(prompts, responses)).mean(0).view(-1, 2)
    judged = torch.tensor([[pair.score_chosen, pair.score_rejected] for pair in pairs])
    return ((scores[:, 0] - scores[:, 1]) * (judged[:, 0] - judged[:, 1]) > 0).float().mean().item()


def train(
    policy: str, model: Path, seed: int, updates: int, args: argparse.Namespace, points: list[dict[str, float]]
) -> PPO:
    """PPO on the ensemble, from ``policy`` and near the start policy; appends measurements to ``points``."""
    base = preset_settings("quick", "ppo")
    config = base.config | {"update_epochs": 2, "num_minibatches": 4, "learning_rate": 6e-5, "kl_coef": args.kl_coef}
    settings = replace(base, reward_model=str(model), seed=seed, config=config)
    split = split_prompts(settings)
    envs = make_envs(settings, settings.num_envs, split.training)
    watched = evaluation_envs(settings, SAMPLES, split.held_out)
    agent = PPO(policy, envs, agent_config(settings, updates), reference=POLICY)
    judge, before = load_reward_model(JUDGE), points[-1]["update"] if points else 0
    for done in range(0 if not points else args.every, updates + 1, args.every):
        agent.learn(done - agent.num_updates_done)
        found = evaluate(agent.policy, agent.reference, watched, samples=SAMPLES, shown=0, judge=judge)
        means = {"proxy": np.mean(found.scores), "judge": np.mean(found.gold), "kl": np.mean(found.kls)}
        points.append({key: float(value) for key, value in means.items()})
        points[-1] |= {"update": before + done, "distinct_2": distinct_n(found.tokens, 2)}
    envs.close(), watched.close()
    return agent


def report(out: Path, seeds: int) -> None:
    """The table, and the figure of proxy and judge against KL."""
    lines = [
        "| comparisons | asked | seeds | judge's order met | judge's score | by seed | proxy | KL, nats | distinct-2 |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    found = {
        (arm, labels): [
            json.loads(path.read_text())
            for seed in range(1, seeds + 1)
            if (path := out / f"{Cell(arm, labels, seed).name}.json").exists()
        ]
        for arm, labels in CELLS
    }
    figure = new_figure(9, 4.2)
    for axes, key, title in zip(figure.subplots(1, 2), ("judge", "proxy"), ("judge", "reward model"), strict=True):
        for (arm, labels), runs in found.items():
            if runs:
                kls, scores = ([np.mean([p[name] for p in at]) for at in points_of(runs)] for name in ("kl", key))
                place = list(dict.fromkeys(name for name, _ in CELLS)).index(arm)
                axes.plot(
                    np.sqrt(np.maximum(kls, 0)), scores, color=COLOURS[place], marker=MARKERS[place],
                    linestyle={100: "dotted", 300: "solid", 1000: "dashed"}[labels], label=f"{arm}, {labels}",
                )  # fmt: skip
        dress(axes, title, "square root of the KL to the start, nats", "mean score")
    figure.axes[0].legend(frameon=False, fontsize=7)
    write_figure(figure, out, "asking")
    for (arm, labels), runs in found.items():
        if runs:
            ends = [run["points"][-1] for run in runs]
            met = mean_interval([run["accuracy"][-1] for run in runs])
            judge, proxy, kl, variety = (
                mean_interval([end[key] for end in ends]) for key in ("judge", "proxy", "kl", "distinct_2")
            )
            each = ", ".join(f"{end['judge']:.2f}" for end in ends)
            cells = (labels, arm, len(runs), met, judge, each, proxy, kl, f"{variety.value:.2f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    table = "\n".join(lines)
    write_text(out / "table.md", table + "\n")
    print(table)


def points_of(runs: list[dict[str, Any]]) -> Iterator[tuple[dict[str, float], ...]]:
    """The measurements of all runs after the same number of updates."""
    return zip(*(run["points"] for run in runs), strict=True)


if __name__ == "__main__":
    main()
