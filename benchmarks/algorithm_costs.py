"""What one update of each algorithm costs on the bundled models: seconds of one core, texts that a reward model reads.

python benchmarks/algorithm_costs.py     (prints the table of docs/algorithms.md; a minute or two)

Seconds are CPU time of one thread, which other programs disturb less than the clock: the least of several updates.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import gymnasium as gym
import torch

from tokenmdp.agents.dpo import DPO, DPOConfig
from tokenmdp.agents.f_dpg import FDPG, FDPGConfig
from tokenmdp.agents.grpo import GRPO, GRPOConfig
from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.agents.reward_model import RewardModelConfig, RewardModelLearner
from tokenmdp.agents.rloo import RLOO, RLOOConfig
from tokenmdp.agents.sft import SFT, SFTConfig
from tokenmdp.credit import make_credit
from tokenmdp.evaluation.credit_quality.counting import CountingRewardModel
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.preferences import Annotator, Comparison, Demonstration, model_scores, pairs_of
from tokenmdp.reward_models import load_reward_model
from tokenmdp.rollouts.groups import sample_groups
from tokenmdp.wrappers import vector

EPISODES = 16
PAIRS = 16
COMMON = {"dtype": "float32", "device": "cpu"}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--updates", type=int, default=2, help="timed, after one that is not")


def main(arguments: list[str] | None = None) -> None:
    updates = parser.parse_args(arguments).updates
    torch.set_num_threads(1)
    print("| algorithm | an update | seconds | texts that the reward model reads |\n|---|---|---:|---:|")
    episodes = f"{EPISODES} episodes, "
    played("PPO, red credit", f"{episodes}16 steps", PPO, PPOConfig(**COMMON), updates, "red")
    config = PPOConfig(**COMMON, value_model="separate")
    played("PPO, red credit, separate value model", f"{episodes}16 steps", PPO, config, updates, "red")
    played("RLOO", f"{episodes}16 steps", RLOO, RLOOConfig(**COMMON), updates)
    config = GRPOConfig(**COMMON, estimator="reward_to_go", divide_by_sd=False)
    played("GRPO, reward to go, red", f"{episodes}16 steps", GRPO, config, updates, "red")
    played("f-DPG", f"{episodes}2 steps", FDPG, FDPGConfig(**COMMON), updates)
    config = FDPGConfig(**COMMON, proposal="lagged")
    played("f-DPG, lagged proposal", f"{episodes}2 steps", FDPG, config, updates)
    pairs = comparisons()
    data = COMMON | {"batch_size": PAIRS, "total_updates": updates + 1}
    texts = [Demonstration(prompt_ids=one.prompt_ids, response_ids=one.chosen_ids) for one in pairs]
    learned("SFT", f"{PAIRS} texts", SFT("imdb-tiny", texts, SFTConfig(**data)), updates)
    learned(
        "reward model", f"{PAIRS} pairs", RewardModelLearner("imdb-tiny", pairs, RewardModelConfig(**data)), updates
    )
    learned("DPO", f"{PAIRS} pairs", DPO("imdb-tiny", pairs, DPOConfig(**data)), updates)


def played(name: str, what: str, kind: Any, config: Any, updates: int, credit: str = "sparse") -> None:
    counting = CountingRewardModel(load_reward_model("imdb-tiny"))
    agent = kind("imdb-tiny", make_envs(counting, credit), config)
    line(name, what, cpu_seconds(agent, updates), counting.forwards / len(agent.history))


def learned(name: str, what: str, learner: Any, updates: int) -> None:
    line(name, what, cpu_seconds(learner, updates), 0)


def line(name: str, what: str, seconds: float, forwards: float) -> None:
    print(f"| {name} | {what} | {seconds:.2f} | {forwards:.0f} |", flush=True)


def make_envs(reward_model: Any, credit: str = "sparse", num_envs: int = EPISODES) -> Any:
    envs = gym.make_vec(
        "tokenmdp:TextGen-IMDb-v0", num_envs=num_envs, autoreset_mode="Disabled", score_when="all_done",
        max_new_tokens=16, reward_model=reward_model,
    )  # fmt: skip
    return vector.CreditReward(envs, make_credit(credit))


def cpu_seconds(learner: Any, updates: int) -> float:
    """Of one update, the least of some; the first one is not timed."""
    learner.learn(1)
    found = []
    for _ in range(updates):
        started = time.process_time()
        learner.learn(1)
        found.append(time.process_time() - started)
    return min(found)


def comparisons() -> list[Comparison]:
    """Pairs of responses of the bundled policy, the better one first."""
    envs = make_envs("imdb-tiny", num_envs=2 * PAIRS)
    tokenizer = envs.unwrapped.task.tokenizer
    policy = CausalLMPolicy.for_task("imdb-tiny", envs.unwrapped.task)
    groups = [group for group in sample_groups(envs, policy, 2, seed=1, batch=0) if group is not None]
    scores = model_scores(load_reward_model("imdb-tiny"), tokenizer, 2 * PAIRS)
    return pairs_of(Annotator("imdb-tiny", scores, temperature=math.inf).judge(groups, seed=1).records)


if __name__ == "__main__":
    main()
