"""The whole path in one page: environment, credit wrapper, agent, and what changed. Offline, under a minute.

python examples/quickstart.py
python examples/quickstart.py --env TextGen-Toy-v0 --policy DIR      # DIR: a causal model with the toy tokenizer
"""

from __future__ import annotations

import argparse

import gymnasium as gym
from rich.console import Console

import tokenmdp  # noqa: F401  (registers the environment ids)
from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.report.heatmap import terminal
from tokenmdp.rollouts import collect
from tokenmdp.rollouts.samples import samples_from_rollout
from tokenmdp.wrappers import vector

SHOWN_SEED = 1_000  # draws the same prompts before and after

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--env", default="TextGen-IMDb-v0")
parser.add_argument("--policy", default="imdb-tiny")
parser.add_argument("--updates", type=int, default=10)
parser.add_argument("--num-envs", type=int, default=32)


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)

    # A native vector environment: 32 texts at once, one reward-model call for those that end together. The library's
    # own agents want autoreset off, so that one update is exactly one episode per row.
    envs = gym.make_vec(args.env, num_envs=args.num_envs, autoreset_mode="Disabled")
    envs = vector.AttentionCreditReward(envs, credit_beta=0.8)
    agent = PPO(args.policy, envs, PPOConfig(seed=1))

    def show(title: str) -> None:
        rollout, metrics = collect(envs, agent.policy, agent.reference, agent.generator, seed=SHOWN_SEED)
        console.print(f"{title}: mean score {metrics['score_mean']:+.2f}, KL {metrics['kl']:z.2f}")
        for sample in samples_from_rollout(rollout, envs.unwrapped.tokenizer)[:4]:
            console.print(
                f"{sample.score:+6.2f} ", terminal(sample.tokens, sample.credits, prompt=sample.prompt), sep=""
            )

    show("before")
    agent.learn(
        args.updates,
        callback=lambda metrics: console.print(f"update {metrics['update']}: {metrics['score_mean']:+.2f}"),
    )
    show("after")


if __name__ == "__main__":
    main()
