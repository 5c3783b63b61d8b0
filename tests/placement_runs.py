"""Small runs on the CPU and the same on the device of pretend_device.py; test_device_placement.py compares them.

python tests/placement_runs.py DIRECTORY NAME ...    # of RUNS, "credit" or "all"; writes DIRECTORY/runs.json
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pretend_device
import torch
from gymnasium.vector import VectorEnv
from pretend_device import Watch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

import tokenmdp
from tokenmdp.agents import algorithm
from tokenmdp.credit import CREDIT_METHODS, make_credit
from tokenmdp.credit.fine_grained import FineReward
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.reward_models import HFRewardModel
from tokenmdp.rollouts.collecting import collect
from tokenmdp.runs.environments import toy_policy
from tokenmdp.wrappers import vector

EPISODES, TOKENS, UPDATES = 4, 5, 1
CONFIG = {"dtype": "float32", "learning_rate": 1e-3, "update_epochs": 2, "num_minibatches": 2, "adam_eps": 1e-5}
UNTIMED = ("seconds", "tokens_per_second")


class Run(NamedTuple):
    """What differs from the plain run: PPO with sparse credit, all responses of one length."""

    credit: str = "sparse"
    options: dict[str, Any] = {}  # of the credit method
    config: dict[str, Any] = {}
    env: dict[str, Any] = {}
    algorithm: str = "ppo"
    policy: str = "gpt2"
    reward_model: str = "gpt2"


SHORT = {"horizon_range": (1, TOKENS), "min_new_tokens": 0}
RUNS = {
    "sparse": Run(),
    "uniform": Run("uniform"),
    "position": Run("position", {"orders": 2}),
    "attention": Run("attention", env=SHORT),
    "abc-d": Run("abc-d", env=SHORT),
    "abc-d2": Run("abc-d2"),
    "red": Run("red", env=SHORT),
    "integrated-gradients": Run("integrated-gradients", {"steps": 2}),
    "deeplift": Run("deeplift"),
    "shapley": Run("shapley", {"budget": 12}),
    "owen": Run("owen", {"budget": 12}),
    "fine-grained": Run("fine-grained", {"parts": (FineReward(None, density="token"),)}),
    "rto": Run("rto"),
    "vine": Run(config={"estimator": "vine", "vine_rollouts": 2}, env=SHORT),
    "lora": Run(config={"lora_rank": 2}),
    "top-k": Run(config={"top_k": 7, "temperature": 0.8, "target_kl": 10.0}, env={"min_new_tokens": 2}),
    "bfloat16": Run("abc-d", config={"dtype": "bfloat16"}),
    "recomputed": Run("uniform", config={"gradient_checkpointing": True, "ent_coef": 0.1}, env=SHORT),
    "full return": Run("red", config={"estimator": "full_return", "kl_target": 1.0}),
    "rloo": Run("uniform", config={"responses_per_prompt": 2}, algorithm="rloo", env=SHORT),
    "grpo": Run("uniform", config={"responses_per_prompt": 2}, algorithm="grpo", env=SHORT),
    "f-dpg": Run(config={"target": "score/2", "responses_per_prompt": 2}, algorithm="f-dpg", env=SHORT),
    "encoder": Run("attention", reward_model="bert", env=SHORT),
    "shared heads": Run("abc-d", policy="llama", env=SHORT),
    "sliding window": Run("abc-d", policy="mistral", env=SHORT),
}

IDS = {"vocab_size": 32, "bos_token_id": 30, "eos_token_id": 30, "pad_token_id": 31}
WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def reward_model(kind: str, device: torch.device) -> HFRewardModel:
    """A classifier with random weights for the toy tokenizer."""
    torch.manual_seed(1)
    model: PreTrainedModel
    if kind == "bert":
        model = BertForSequenceClassification(BertConfig(num_labels=1, initializer_range=0.2, **IDS, **WIDTHS))
    else:
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.2}
        model = GPT2ForSequenceClassification(GPT2Config(num_labels=1, **IDS, **shape))
    return HFRewardModel(model.to(device), load_tokenizer("toy"))


def language_model(kind: str) -> PreTrainedModel:
    """A policy with random weights."""
    torch.manual_seed(0)
    shape: dict[str, Any] = IDS | WIDTHS | {"num_key_value_heads": 1, "initializer_range": 0.2}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape))
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(sliding_window=4, **shape))
    return toy_policy(seed=0)


def make_envs(model: HFRewardModel, **options: Any) -> VectorEnv:
    """Four rows of the toy task, scored by ``model``; all responses have one length unless told otherwise."""
    options = {"reward_model": model, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS} | options
    rows = {"num_envs": EPISODES, "autoreset_mode": "Disabled", "score_when": "all_done"}
    return gym.make_vec("tokenmdp:TextGen-Toy-v0", **rows, **options)


def credited(envs: VectorEnv, name: str, options: dict[str, Any], device: torch.device) -> VectorEnv:
    """The environments under a credit method; the two policies of rto are on the device."""
    if name == "rto":
        lms = {"tuned": toy_policy(seed=3), "reference": toy_policy(seed=4)}
        task = envs.unwrapped.task
        options = {key: tokenmdp.CausalLMPolicy.for_task(lm, task).to(device) for key, lm in lms.items()}
    return vector.CreditReward(envs, make_credit(name, **options))


def play(run: Run, device: torch.device, directory: Path) -> dict[str, Any]:
    """Learn, watched, and save; then load and evaluate: the metrics, the mean score of new texts, what was counted."""
    kind: Any = algorithm(run.algorithm)
    plain = make_envs(reward_model(run.reward_model, device), **run.env)
    envs = credited(plain, run.credit, run.options, device)
    config = kind.config_class(device=str(device), **(CONFIG | run.config))
    # Another one than the policy: else the KL, and what a critic learns of it, would be rounding error alone.
    reference = None if config.lora_rank else toy_policy(seed=5)
    agent = kind(language_model(run.policy), envs, config, reference=reference)
    at: dict[str, list[int]] = {"act": [], "gradient": [], "step": []}  # waits so far, at the start of each call
    for owner, name in ((agent.policy, "act"), (agent, "gradient"), (agent.optimizer, "step")):
        setattr(owner, name, noting(getattr(owner, name), at[name]))
    with Watch() as watch:
        agent.learn(UPDATES)
    agent.save(directory)
    loaded = kind.load(directory, envs)
    with Watch():
        evaluation = tokenmdp.evaluate(plain, loaded, episodes=EPISODES)
    return {
        "history": [{key: number for key, number in one.items() if key not in UNTIMED} for one in agent.history],
        "score": evaluation.score.value,
        "waits": [[kind, place, count] for (kind, place), count in watch.waits.most_common()],
        "waits of a token": np.diff(at["act"]).tolist(),
        "waits of a minibatch": np.subtract(at["step"], at["gradient"][: len(at["step"])]).tolist(),
        "operations": watch.operations,
    }


def noting(call: Callable[..., Any], waits: list[int]) -> Callable[..., Any]:
    """``call``, which notes how often the host has waited before it."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        waits.append(0 if Watch.now is None else Watch.now.waits.total())
        return call(*args, **kwargs)

    return noted


def credit(device: torch.device) -> dict[str, Any]:
    """The token rewards that every method of the registry gives to the same texts, by method."""
    model, policy = reward_model("gpt2", device), None
    found = {}
    for run in (RUNS[name] for name in CREDIT_METHODS):
        envs = credited(make_envs(model, **SHORT), run.credit, run.options, device)
        if policy is None:
            policy = tokenmdp.CausalLMPolicy.for_task(toy_policy(seed=0), envs.unwrapped.task).to(device)
        with Watch():
            rollout, _ = collect(envs, policy, None, torch.Generator(device).manual_seed(0), seed=0)
        found[run.credit] = rollout.token_rewards.tolist()
    return found


def mistakes(device: torch.device) -> list[str]:
    """What is said of operations that CUDA refuses, and that a CPU does."""
    here, there = torch.arange(3), torch.arange(3).to(device)
    weights = torch.ones(3, 2).to(device)
    wrong: list[Callable[[], Any]] = [
        lambda: here + there,
        lambda: torch.cat([there, here]),
        lambda: torch.nn.functional.embedding(here, weights),
        lambda: weights.index_put_((there,), torch.zeros(3, 2)),
    ]
    said = []
    with Watch():
        assert (there + torch.tensor(1)).tolist() == [1, 2, 3]  # a number may come from anywhere
        for call in wrong:
            try:
                call()
            except RuntimeError as error:
                said.append(str(error))
    return said


def main(directory: Path, names: list[str]) -> None:
    devices = {"there": pretend_device.DEVICE, "here": torch.device("cpu")}
    found: dict[str, Any] = {"mistakes": mistakes(pretend_device.DEVICE)}
    for name in names:
        try:
            found[name] = {
                where: credit(device) if name == "credit" else play(RUNS[name], device, directory / name / where)
                for where, device in devices.items()
            }
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    (directory / "runs.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), list(RUNS) if sys.argv[2:] == ["all"] else sys.argv[2:])
