"""Does credit matter? The three reward wrappers on the same seeds, with intervals.

    python benchmarks/compare_wrappers.py --seeds 1 2 3 --updates 60 --out runs/compare

Runs ``--jobs`` at a time, in processes of one thread each. A finished run is not repeated, so an interrupted
comparison is continued by the same command. Prints one row a wrapper: the mean score over all updates (the area under
the learning curve), the mean of the last ten updates and of their KL to the reference, each with a 95% t interval over
seeds, and the paired differences to attention credit.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from scipy import stats

from tokenmdp.report.curves import plot_learning_curves, read_metrics

CREDITS = ("sparse", "uniform", "attention")


def train(credit: str, seed: int, updates: int, num_envs: int, max_new_tokens: int, options: dict, file: Path) -> Path:
    """One run; writes its metrics, a line an update, when it is finished."""
    import gymnasium as gym
    import torch

    import tokenmdp  # noqa: F401  registers the environments
    from tokenmdp.agents.ppo import PPO, PPOConfig
    from tokenmdp.checkpoints import write_text
    from tokenmdp.credit import make_credit
    from tokenmdp.wrappers import vector

    if file.exists():
        return file
    torch.set_num_threads(1)
    envs = gym.make_vec(
        "TextGen-IMDb-v0", num_envs=num_envs, autoreset_mode="Disabled", max_new_tokens=max_new_tokens,
        score_when="all_done",
    )  # fmt: skip
    envs = vector.CreditReward(envs, make_credit(credit))
    agent = PPO(policy="imdb-tiny", envs=envs, config=PPOConfig(seed=seed, **options))
    agent.learn(num_updates=updates)
    write_text(file, "".join(json.dumps(row) + "\n" for row in agent.history))
    return file


def interval(values: list[float]) -> str:
    """Mean and 95% t interval over seeds."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.2f}"
    low, high = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--options", type=json.loads, default={}, help='PPOConfig fields as JSON: {"kl_coef": 0.1}')
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    shape = (arguments.updates, arguments.num_envs, arguments.max_new_tokens, arguments.options)
    settings = dict(zip(("updates", "num_envs", "max_new_tokens", "options"), shape, strict=True))
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings_file = arguments.out / "settings.json"
    if settings_file.exists() and json.loads(settings_file.read_text()) != settings:
        raise SystemExit(
            f"{arguments.out} holds runs of other settings ({settings_file.read_text()}); choose another --out"
        )
    settings_file.write_text(json.dumps(settings))

    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        futures = {
            (credit, seed): pool.submit(train, credit, seed, *shape, arguments.out / f"{credit}-{seed}.jsonl")
            for seed in arguments.seeds
            for credit in CREDITS
        }
        runs = {key: read_metrics(future.result()) for key, future in futures.items()}

    curves = {key: np.array([row["score_mean"] for row in rows]) for key, rows in runs.items()}
    area = {credit: [curves[credit, seed].mean() for seed in arguments.seeds] for credit in CREDITS}
    print("| wrapper | mean score, all updates | last ten updates | KL, last ten | attention minus this, all updates |")
    print("|---|---|---|---|---|")
    for credit in CREDITS:
        end = [curves[credit, seed][-10:].mean() for seed in arguments.seeds]
        kl = [np.mean([row["kl"] for row in runs[credit, seed][-10:]]) for seed in arguments.seeds]
        paired = [ours - theirs for ours, theirs in zip(area["attention"], area[credit], strict=True)]
        ahead = "" if credit == "attention" else interval(paired)
        print(f"| {credit} | {interval(area[credit])} | {interval(end)} | {interval(kl)} | {ahead} |")

    grouped = {credit: [runs[credit, seed] for seed in arguments.seeds] for credit in CREDITS}
    plot_learning_curves(grouped, arguments.out / "curves.png")
    print(f"wrote {arguments.out / 'curves.png'}")


if __name__ == "__main__":
    main()
