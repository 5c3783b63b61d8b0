"""Stable-Baselines3 collecting with a language model: steps a second with key-value cache reuse and without.

    python benchmarks/sb3_cache.py --out runs/sb3_cache.json

PPO collects whole rollouts and does not train; cache reuse is switched on and off from rollout to rollout. A step is
one token in one environment and includes the environments and the reward model.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from tokenmdp.interop.sb3.policy import CausalLMActorCriticPolicy


class CollectOnly(PPO):
    """PPO without its update, which is the same with and without cache."""

    def train(self) -> None:
        """Keep the weights."""
        self.policy.set_training_mode(True)


class Alternate(BaseCallback):
    """Switches cache reuse on in every second rollout, and times the rollouts."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[bool, list[float]] = {True: [], False: []}

    def _on_rollout_start(self) -> None:
        self.model.policy.reuse_cache = len(self.seconds[True]) <= len(self.seconds[False])
        self.start = time.perf_counter()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.seconds[self.model.policy.reuse_cache].append(time.perf_counter() - self.start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rollouts", type=int, default=4, help="of each kind, after one of each that is not counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    options = {"max_new_tokens": arguments.max_new_tokens}
    envs = make_vec_env("tokenmdp:TextGen-IMDb-v0", arguments.num_envs, seed=1, env_kwargs=options)
    model = CollectOnly(
        CausalLMActorCriticPolicy, envs, n_steps=arguments.max_new_tokens, batch_size=arguments.num_envs, seed=1,
        policy_kwargs={"model": "imdb-tiny"}, device="cpu",
    )  # fmt: skip
    clock = Alternate()
    steps = arguments.num_envs * arguments.max_new_tokens
    model.learn(2 * (arguments.rollouts + 1) * steps, callback=clock)

    reused, whole = (steps / np.array(clock.seconds[reuse][1:]) for reuse in (True, False))
    result = {
        "model": "imdb-tiny", "num_envs": arguments.num_envs, "max_new_tokens": arguments.max_new_tokens,
        "threads": arguments.threads, "torch": torch.__version__, "machine": platform.machine(),
        "steps_per_second_reused": reused.tolist(), "steps_per_second_whole": whole.tolist(),
        "ratio": float(np.median(reused) / np.median(whole)), "ratios": (reused / whole).tolist(),
    }  # fmt: skip
    print("| collection | steps/s, median | least | most |")
    print("|---|---|---|---|")
    for name, rates in (("whole texts", whole), ("cache reuse", reused)):
        print(f"| {name} | {np.median(rates):.0f} | {rates.min():.0f} | {rates.max():.0f} |")
    print(f"ratio {result['ratio']:.1f} (pairs {min(result['ratios']):.1f} to {max(result['ratios']):.1f})")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
