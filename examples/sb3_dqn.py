"""Stable-Baselines3's DQN learns the toy task from token rewards: off-policy, through a replay buffer.

python examples/sb3_dqn.py

A Q-value for each of 32 words is within reach of a small network; for tens of thousands of tokens it is not.
"""

from __future__ import annotations

import argparse

import gymnasium as gym
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_vec_env

from tokenmdp.evaluation import evaluate
from tokenmdp.interop.sb3 import TokenRewardReplayBuffer
from tokenmdp.wrappers import AttentionCreditReward

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=12000)
parser.add_argument("--num-envs", type=int, default=8)
parser.add_argument("--seed", type=int, default=1)

ENV_ID = "tokenmdp:TextGen-Toy-v0"


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)

    envs = make_vec_env(ENV_ID, args.num_envs, args.seed, wrapper_class=AttentionCreditReward)
    eval_envs = gym.make_vec(ENV_ID, num_envs=32)
    model = DQN(
        "MultiInputPolicy",
        envs,
        replay_buffer_class=TokenRewardReplayBuffer,  # without it every wrapper trains like SparseReward
        learning_rate=1e-3,
        learning_starts=1000,
        train_freq=4,
        gradient_steps=4,
        target_update_interval=250,
        exploration_fraction=0.5,
        exploration_final_eps=0.05,
        gamma=1.0,
        seed=args.seed,
        device="cpu",
    )

    # deterministic: the greedy choice. DQN's own exploration draws one random number for the whole batch.
    print("before:", evaluate(eval_envs, model, episodes=128, deterministic=True), flush=True)
    model.learn(args.steps)
    print("after:", evaluate(eval_envs, model, episodes=128, deterministic=True))


if __name__ == "__main__":
    main()
