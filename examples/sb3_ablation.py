"""The ablation through Stable-Baselines3: its PPO fine-tunes the language model on each wrapper's token rewards.

python examples/sb3_ablation.py --seeds 1 2 3

Same hyper-parameters, seeds and prompts; only the credit differs. SB3's PPO has no KL penalty to a reference model, so
runs are short and the learning rate is small: trained on, the model repeats whatever scores. The KL that a run has
spent is drawn below its score, because the score alone flatters runs that spend more.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

import tokenmdp  # noqa: F401  (registers the environment ids)
from tokenmdp.evaluation import evaluate
from tokenmdp.interop.sb3 import GymVectorToSB3, TokenRewardCallback
from tokenmdp.interop.sb3.policy import CausalLMActorCriticPolicy, causal_lm_kwargs
from tokenmdp.intervals import mean_interval
from tokenmdp.report.curves import plot_learning_curves
from tokenmdp.wrappers import vector

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--env", default="TextGen-IMDb-v0")
parser.add_argument("--policy", default="imdb-tiny")
parser.add_argument("--rollouts", type=int, default=16)
parser.add_argument("--num-envs", type=int, default=32)
parser.add_argument("--learning-rate", type=float, default=2e-5)
parser.add_argument("--seeds", type=int, nargs="+", default=[1])
parser.add_argument("--out", type=Path, default=Path("runs/sb3_ablation.png"))


class Curve(BaseCallback):
    """One record per rollout: the mean score of its episodes, and their KL to the model as it was at the start."""

    def _on_training_start(self) -> None:
        self.reference, self.records = copy.deepcopy(self.model.policy), []

    def _on_rollout_start(self) -> None:
        self.model.ep_info_buffer.clear()

    def _on_step(self) -> bool:
        return True

    @torch.no_grad()
    def _on_rollout_end(self) -> None:
        buffer, device = self.model.rollout_buffer, self.model.device
        obs = {
            key: torch.as_tensor(rows, device=device).flatten(0, 1)  # (n_steps, N, S) -> (n_steps * N, S)
            for key, rows in buffer.observations.items()
        }
        actions = torch.as_tensor(buffer.actions, device=device).flatten()
        _, ref_logprobs, _ = self.reference.evaluate_actions(obs, actions)
        kl_per_token = buffer.log_probs.mean() - ref_logprobs.mean().item()
        # TokenRewardCallback, before this one, has completed the episodes that the rollout cut off.
        score, length = (np.mean([episode[key] for episode in self.model.ep_info_buffer]) for key in ("r", "l"))
        self.records.append({"score_mean": score, "kl": kl_per_token * length})


def make_model(wrapper: type[gym.vector.VectorWrapper], seed: int, args: argparse.Namespace) -> PPO:
    envs = wrapper(gym.make_vec(args.env, num_envs=args.num_envs, autoreset_mode="SameStep"))
    task = envs.unwrapped.task
    return PPO(
        CausalLMActorCriticPolicy, GymVectorToSB3(envs), learning_rate=args.learning_rate, n_steps=task.max_new_tokens,
        batch_size=128, n_epochs=2, gamma=1.0, vf_coef=0.1, seed=seed,
        policy_kwargs=causal_lm_kwargs(args.policy, task, compute_dtype=torch.bfloat16),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    eval_envs = gym.make_vec(args.env, num_envs=64)
    print("before:", evaluate(eval_envs, make_model(vector.SparseReward, 1, args), episodes=256), flush=True)
    runs = {}
    for wrapper in (vector.SparseReward, vector.UniformReward, vector.AttentionCreditReward):
        name = wrapper.__name__
        runs[name], after = [], []
        for seed in args.seeds:
            model, curve = make_model(wrapper, seed, args), Curve()
            model.learn(args.rollouts * args.num_envs * model.n_steps, callback=[TokenRewardCallback(), curve])
            result = evaluate(eval_envs, model, episodes=256)
            print(f"{name} seed {seed}, after: {result}, KL {curve.records[-1]['kl']:.2f}", flush=True)
            runs[name].append(curve.records)
            after.append(result.score.value)
        if len(after) > 1:
            print(f"{name}, after, {len(after)} seeds: score {mean_interval(after)}", flush=True)

    window = 1 + args.rollouts // 10
    print("curves:", plot_learning_curves(runs, args.out, metric=("score_mean", "kl"), window=window, title=args.env))


if __name__ == "__main__":
    main()
