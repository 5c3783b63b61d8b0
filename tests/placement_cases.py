"""Small runs on any device, which test_device_placement.py and test_on_cuda.py compare with the same on the CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium as gym
import torch
from gymnasium.vector import VectorEnv
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
from tokenmdp.credit import make_credit
from tokenmdp.credit.fine_grained import FineReward
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.reward_models import HFRewardModel
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
    "copied": Run(config={"dtype": "bfloat16", "rollout_steps": "copied", "lora_rank": 2}),
    "recorded": Run("red", config={"rollout_steps": "recorded"}, env=SHORT),
    "recomputed": Run("uniform", config={"gradient_checkpointing": True, "ent_coef": 0.1}, env=SHORT),
    "separate values": Run(config={"value_model": "separate"}, env=SHORT),
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


def make_agent(run: Run, envs: VectorEnv, device: torch.device) -> Any:
    """The agent of a run, which learns from another reference than its policy.

    With the policy itself the KL, and what a critic learns of it, would be rounding error alone.
    """
    kind: Any = algorithm(run.algorithm)
    config = kind.config_class(device=str(device), **(CONFIG | run.config))
    reference = None if config.lora_rank else toy_policy(seed=5)
    return kind(language_model(run.policy), envs, config, reference=reference)


def timeless(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The metrics that do not depend on the clock."""
    return [{key: number for key, number in metrics.items() if key not in UNTIMED} for metrics in history]
