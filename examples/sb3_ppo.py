"""Stable-Baselines3's PPO learns from attention credit: one wrapper around the environments, one callback.

python examples/sb3_ppo.py
python examples/sb3_ppo.py --env TextGen-IMDb-v0 --policy imdb-tiny --steps 8192

Without --policy a small new network learns the toy task. With it, PPO fine-tunes that pretrained language model, for
which SB3's default learning rate is far too high. SB3 has no reference model: nothing keeps a long run near it.
"""

from __future__ import annotations

import argparse

import gymnasium as gym
from stable_baselines3 import PPO

import tokenmdp  # noqa: F401  (registers the environment ids)
from tokenmdp.evaluation import evaluate
from tokenmdp.interop.sb3 import GymVectorToSB3, TokenRewardCallback
from tokenmdp.interop.sb3.policy import CausalLMActorCriticPolicy, causal_lm_kwargs
from tokenmdp.wrappers import vector

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--env", default="TextGen-Toy-v0")
parser.add_argument("--policy", help="a pretrained language model for this environment; default: SB3's small network")
parser.add_argument("--steps", type=int, default=12288)
parser.add_argument("--num-envs", type=int, default=32)
parser.add_argument("--num-steps", type=int, default=32, help="of each row in a rollout: several whole episodes")
parser.add_argument("--learning-rate", type=float, help="default: 1e-3, for a pretrained model 2e-5")
parser.add_argument("--seed", type=int, default=1)


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)

    # One batched environment calls the reward model once per step. make_vec_env, as in sb3_maskable.py, works as well.
    envs = gym.make_vec(args.env, num_envs=args.num_envs, autoreset_mode="SameStep")
    eval_envs = gym.make_vec(args.env, num_envs=args.num_envs)
    if args.policy is None:
        policy, learning_rate, policy_kwargs = "MultiInputPolicy", 1e-3, None
    else:
        policy, learning_rate = CausalLMActorCriticPolicy, 2e-5
        policy_kwargs = causal_lm_kwargs(args.policy, envs.unwrapped.task)
    model = PPO(
        policy,
        GymVectorToSB3(vector.AttentionCreditReward(envs)),
        learning_rate=args.learning_rate or learning_rate,
        n_steps=args.num_steps,
        batch_size=256,
        n_epochs=4,
        gamma=1.0,
        policy_kwargs=policy_kwargs,
        seed=args.seed,
        device="cpu" if args.policy is None else "auto",
    )

    print("before:", evaluate(eval_envs, model, episodes=128), flush=True)
    # Without the callback every wrapper would train like SparseReward.
    model.learn(args.steps, callback=TokenRewardCallback())
    print("after:", evaluate(eval_envs, model, episodes=128))


if __name__ == "__main__":
    main()
