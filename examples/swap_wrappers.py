"""An ablation is one line: the same seed under the three credit wrappers, and the three curves in one picture.

python examples/swap_wrappers.py --updates 60 --seeds 1 2 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium as gym

import tokenmdp  # noqa: F401  (registers the environment ids)
from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.report.curves import plot_learning_curves
from tokenmdp.wrappers import vector

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--env", default="TextGen-IMDb-v0")
parser.add_argument("--policy", default="imdb-tiny")
parser.add_argument("--updates", type=int, default=60)
parser.add_argument("--num-envs", type=int, default=32)
parser.add_argument("--seeds", type=int, nargs="+", default=[1])
parser.add_argument("--out", type=Path, default=Path("runs/swap_wrappers.png"))

WRAPPERS = (vector.SparseReward, vector.UniformReward, vector.AttentionCreditReward)


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    runs = {}
    for wrapper in WRAPPERS:
        name = wrapper.__name__
        runs[name] = []
        for seed in args.seeds:
            # The same seed gives every wrapper the same prompts and the same first batch: only the credit differs.
            envs = wrapper(gym.make_vec(args.env, num_envs=args.num_envs, autoreset_mode="Disabled"))
            agent = PPO(args.policy, envs, PPOConfig(seed=seed))
            agent.learn(args.updates)
            runs[name].append(agent.history)
            last = agent.history[-1]
            print(f"{name} seed {seed}: score {last['score_mean']:+.2f} at KL {last['kl']:.2f}", flush=True)

    # The score alone flatters runs that spend more KL, so both are drawn.
    window = 1 + args.updates // 10
    path = plot_learning_curves(runs, args.out, metric=("score_mean", "kl"), window=window, title=args.env)
    print(f"curves: {path}")


if __name__ == "__main__":
    main()
