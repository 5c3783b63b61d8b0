"""sb3-contrib's MaskablePPO with token rewards, where an early end of the text is illegal.

python examples/sb3_maskable.py
"""

from __future__ import annotations

import argparse

import gymnasium as gym
from sb3_contrib import MaskablePPO
from stable_baselines3.common.env_util import make_vec_env

from tokenmdp.evaluation import evaluate
from tokenmdp.interop.sb3 import TokenRewardCallback
from tokenmdp.wrappers import AttentionCreditReward

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--env", default="TextGen-Toy-v0")
parser.add_argument("--min-new-tokens", type=int, default=3)
parser.add_argument("--steps", type=int, default=12288)
parser.add_argument("--num-envs", type=int, default=16)
parser.add_argument("--seed", type=int, default=1)


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)

    env_id, task = f"tokenmdp:{args.env}", {"min_new_tokens": args.min_new_tokens}
    envs = make_vec_env(env_id, args.num_envs, args.seed, env_kwargs=task, wrapper_class=AttentionCreditReward)
    eval_envs = gym.make_vec(env_id, num_envs=args.num_envs, **task)
    model = MaskablePPO(
        "MultiInputPolicy", envs, learning_rate=1e-3, n_steps=64, batch_size=256, n_epochs=4, gamma=1.0,
        seed=args.seed, device="cpu",
    )  # fmt: skip

    # MaskablePPO and `evaluate` ask the environments for action_masks() themselves.
    print("before:", evaluate(eval_envs, model, episodes=128), flush=True)
    model.learn(args.steps, callback=TokenRewardCallback())
    result = evaluate(eval_envs, model, episodes=128)
    print("after:", result)
    print(f"shortest text: {result.lengths.min()} tokens, and {args.min_new_tokens + 1} is the least with its end")


if __name__ == "__main__":
    main()
