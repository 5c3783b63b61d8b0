"""An ablation over every credit method is one loop over the registry: same seed, same prompts, only the credit differs.

python examples/credit_ablation.py --updates 20
python examples/credit_ablation.py --methods sparse attention red --seeds 1 2 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium as gym

import tokenmdp  # noqa: F401  (registers the environment ids)
from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.credit import CREDIT_METHODS, make_credit
from tokenmdp.credit.fine_grained import FineReward
from tokenmdp.report.curves import plot_learning_curves
from tokenmdp.wrappers import vector

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--methods", nargs="+", default=list(CREDIT_METHODS))
parser.add_argument("--tuned", help="directory of a preference-tuned policy, for rto; `tokenmdp train dpo` makes one")
parser.add_argument("--updates", type=int, default=20)
parser.add_argument("--num-envs", type=int, default=32)
parser.add_argument("--seeds", type=int, nargs="+", default=[1])
parser.add_argument("--out", type=Path, default=Path("runs/credit_ablation.png"))


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    options = {
        "shapley": {"budget": 34},  # two permutations of 16 tokens and their ends: this is a demonstration
        "owen": {"budget": 34},
        "integrated-gradients": {"steps": 8},
        "fine-grained": {"parts": (FineReward("lexicon", density="token"), FineReward(None, density="text"))},
        "rto": {"tuned": args.tuned},
    }
    runs = {}
    for name in args.methods:
        if name == "rto" and args.tuned is None:
            print("rto: left out, it needs --tuned")
            continue
        runs[name] = []
        for seed in args.seeds:
            envs = gym.make_vec("TextGen-IMDb-v0", num_envs=args.num_envs, autoreset_mode="Disabled")
            credit = make_credit(name, **options.get(name, {}))
            agent = PPO("imdb-tiny", vector.CreditReward(envs, credit), PPOConfig(seed=seed))
            agent.learn(args.updates)
            runs[name].append(agent.history)
            last = agent.history[-1]
            print(f"{name} seed {seed}: score {last['score_mean']:+.2f} at KL {last['kl']:.2f}", flush=True)
    path = plot_learning_curves(runs, args.out, metric=("score_mean", "kl"), window=1 + args.updates // 10)
    print(f"curves: {path}")


if __name__ == "__main__":
    main()
