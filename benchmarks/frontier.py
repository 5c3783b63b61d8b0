"""Judge's score against KL: every algorithm with a sweep of its knob, on one learned reward model and its comparisons.

    tokenmdp prefer --pairs 6144 --out runs/pairs.jsonl
    tokenmdp train reward-model --data runs/pairs.jsonl --out runs/rm
    python benchmarks/frontier.py --data runs/pairs.jsonl --reward-model runs/rm/checkpoint --out runs/frontier
    python benchmarks/frontier.py --out runs/frontier --table           # of what is there

PPO, RLOO and best-of-n follow the learned reward model, DPO the comparisons that it learned from; the judge scores them
all. A finished run is not run again. With --part 0/2 and --part 1/2 two processes share the work.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenmdp.evaluation.policies import gold_scores, load_evaluation
from tokenmdp.files import write_text
from tokenmdp.intervals import Estimate, mean_interval
from tokenmdp.models.tokens import distinct_n
from tokenmdp.report.drawing import COLOURS, dress, new_figure, write_figure
from tokenmdp.reward_models import load_reward_model
from tokenmdp.runs import training
from tokenmdp.runs.environments import evaluation_envs, split_prompts
from tokenmdp.runs.opening import load_policy
from tokenmdp.runs.settings import PRESETS, preset_settings

JUDGE = "imdb-gold"
SAMPLES = 256
# Name in the figure -> algorithm, its knob, and the values of it.
SWEEPS: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "PPO, red": ("ppo", "kl_coef", (1.0, 0.38, 0.15)),
    "RLOO": ("rloo", "kl_coef", (1.0, 0.38, 0.15)),
    "DPO": ("dpo", "dpo_beta", (0.3, 0.1, 0.03)),
    "best of n": ("best-of-n", "n", (2, 4, 16)),
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", type=Path, help="comparisons, for DPO")
parser.add_argument("--reward-model", help="directory of the learned reward model")
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--seeds", type=int, default=2)
parser.add_argument("--only", nargs="*", choices=list(SWEEPS), default=list(SWEEPS))
parser.add_argument("--part", default="0/1", help="K/N: every N-th run from the K-th on")
parser.add_argument("--table", action="store_true", help="only report what is there")


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    if not args.table:
        if args.data is None or args.reward_model is None:
            parser.error("--data and --reward-model are needed to run anything")
        part, parts = map(int, args.part.split("/"))
        todo = [
            (name, value, seed)
            for seed in range(1, args.seeds + 1)
            for name in args.only
            for value in SWEEPS[name][2]
        ]  # fmt: skip
        for name, value, seed in todo[part::parts]:
            path = place(args.out, name, value, seed).with_suffix(".json")
            if not path.exists():
                print(f"{name}, {SWEEPS[name][1]} {value:g}, seed {seed}", flush=True)
                write_text(path, json.dumps(measured(args, name, value, seed)) + "\n")
    report(args.out)


def place(out: Path, name: str, value: float, seed: int) -> Path:
    return out / "runs" / f"{SWEEPS[name][0]}-{SWEEPS[name][1]}-{value:g}-seed{seed}".replace(".", "_")


def measured(args: argparse.Namespace, name: str, value: float, seed: int) -> dict[str, Any]:
    """Scores of judge and reward model, KL and texts of one policy on held-out prompts."""
    algorithm, knob, _ = SWEEPS[name]
    if algorithm == "best-of-n":
        return best_of(int(value), args.reward_model, seed)
    settings = preset_settings("quick", algorithm)
    settings = replace(
        settings, judge=JUDGE, reward_model=args.reward_model, seed=seed, eval_samples=SAMPLES,
        config=settings.config | {knob: value},
    )  # fmt: skip
    if algorithm == "dpo":
        settings = replace(settings, data=str(args.data), held_out=0.1)
    out = place(args.out, name, value, seed)
    with contextlib.redirect_stdout(io.StringIO()):
        training.train(settings, out, None if algorithm == "dpo" else PRESETS["quick"].updates, 1000)
    after = load_evaluation(out / "after.json")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(record["seconds"] for record in records)
    return {
        "judge": after.gold, "reward_model": after.scores, "kl": after.kls, "distinct_2": distinct_n(after.tokens, 2),
        "seconds": seconds,
    }  # fmt: skip


def best_of(n: int, reward_model: str, seed: int) -> dict[str, Any]:
    """The best of n responses by the reward model; its KL is at most log n - (n - 1) / n."""
    settings = replace(preset_settings("quick", "rloo"), reward_model=reward_model)
    envs = evaluation_envs(settings, SAMPLES, split_prompts(settings).held_out)
    policy, judge = load_policy("imdb-tiny", envs, {}, "cpu"), load_reward_model(JUDGE)
    judged, scored, texts = [], [], []
    for draw in range(n):
        rows: dict[str, list[Any]] = defaultdict(list)
        # The seed draws the prompts too, so every draw continues them with noise of its own.
        generator = torch.Generator().manual_seed(1000 * seed + draw)
        for rollout in _played(envs, policy, generator):
            rows["scored"] += rollout.scores.tolist()
            rows["judged"] += gold_scores(judge, rollout).tolist()
            response = rollout.input_ids[:, rollout.prompt_slots :]
            rows["texts"] += [ids[kept].tolist() for ids, kept in zip(response, rollout.response_mask, strict=True)]
        scored.append(rows["scored"]), judged.append(rows["judged"]), texts.append(rows["texts"])
    envs.close()
    best = np.argmax(scored, axis=0)
    columns = range(SAMPLES)
    return {
        "judge": [judged[best[one]][one] for one in columns],
        "reward_model": [scored[best[one]][one] for one in columns],
        "kl": [math.log(n) - (n - 1) / n] * SAMPLES,
        "distinct_2": distinct_n([texts[best[one]][one] for one in columns], 2),
        "seconds": 0.0,
    }


def _played(envs: Any, policy: Any, generator: torch.Generator) -> Any:
    from tokenmdp.rollouts import collect

    for start in range(0, SAMPLES, envs.num_envs):
        yield collect(envs, policy, None, generator, seed=10_000 + start, credited_rows=0)[0]


def report(out: Path) -> None:
    """The table and the figure of the runs that are there; an interval over seeds, or over texts with one seed."""
    lines = ["| | knob | seeds | judge's score | reward model's score | KL, nats | distinct-2 | seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    figure = new_figure(8, 4.6)
    axes = figure.subplots()
    for colour, (name, (_, knob, values)) in zip(COLOURS, SWEEPS.items(), strict=False):
        points: list[tuple[Estimate, Estimate]] = []
        for value in values:
            paths = [place(out, name, value, seed).with_suffix(".json") for seed in range(1, 100)]
            found = [json.loads(path.read_text()) for path in paths if path.exists()]
            if not found:
                continue
            judge, proxy, kl = (over_seeds([one[key] for one in found]) for key in ("judge", "reward_model", "kl"))
            points.append((kl, judge))
            variety, seconds = (np.mean([one[key] for one in found]) for key in ("distinct_2", "seconds"))
            lines.append(
                f"| {name} | {knob} {value:g} | {len(found)} | {judge} | {proxy} | {kl.value:.2f} | {variety:.3f} | "
                f"{seconds:.0f} |"
            )
        points.sort(key=lambda point: point[0].value)
        if points:
            bars = [
                [score.value - score.low for _, score in points], [score.high - score.value for _, score in points]
            ]  # fmt: skip
            places = [math.sqrt(max(kl.value, 0)) for kl, _ in points]
            axes.errorbar(
                places, [s.value for _, s in points], yerr=bars, color=colour, marker="o", capsize=3, label=name
            )
    dress(axes, "", "square root of the KL to the start, nats", "mean score of the judge")
    axes.legend(frameon=False)
    write_figure(figure, out, "frontier")
    table = "\n".join(lines)
    write_text(out / "table.md", table + "\n")
    print(table)


def over_seeds(lists: list[list[float]]) -> Estimate:
    """The mean with its interval over texts and seeds together: of the texts' means where there are several seeds."""
    return mean_interval(np.mean(lists, axis=0) if len(lists) > 1 else lists[0])


if __name__ == "__main__":
    main()
