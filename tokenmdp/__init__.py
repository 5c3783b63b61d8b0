"""Text generation as a token MDP behind Gymnasium.

Importing this package registers ``TextGen-IMDb-v0``, ``TextGen-v0`` and ``TextGen-Toy-v0``. Its public names load on
first use, so that the import costs no more than Gymnasium's (torch alone would cost ten times as much).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import gymnasium as _gym

_LAZY_NAMES = {
    "CausalLMPolicy": "tokenmdp.models.policy",
    "Credit": "tokenmdp.types",
    "Episode": "tokenmdp.types",
    "HFRewardModel": "tokenmdp.reward_models",
    "LexiconRewardModel": "tokenmdp.reward_models",
    "Outcome": "tokenmdp.types",
    "RewardModel": "tokenmdp.reward_models",
    "RewardOutput": "tokenmdp.types",
    "Rollout": "tokenmdp.types",
    "TextGenEnv": "tokenmdp.envs.single",
    "TextGenVectorEnv": "tokenmdp.envs.vector",
    "evaluate": "tokenmdp.evaluation",
    "load_reward_model": "tokenmdp.reward_models",
    "load_tokenizer": "tokenmdp.models.loading",
}
_LAZY_MODULES = ("credit", "envs", "evaluation", "losses", "models", "reward_models", "types", "wrappers")

__all__ = [*_LAZY_NAMES, *_LAZY_MODULES]

_ENTRY_POINT, _VECTOR_ENTRY_POINT = "tokenmdp.envs.single:TextGenEnv", "tokenmdp.envs.vector:TextGenVectorEnv"

# Every preset that can move a learning curve is written out: changing one is a new version of its id.
_gym.register(
    id="TextGen-IMDb-v0",
    entry_point=_ENTRY_POINT,
    vector_entry_point=_VECTOR_ENTRY_POINT,
    kwargs={
        "tokenizer": "imdb-tiny",
        "reward_model": "imdb-tiny",
        "prompts": "imdb-tiny",
        "max_new_tokens": 16,
        "max_prompt_tokens": 16,
    },
)
_gym.register(
    id="TextGen-v0",
    entry_point=_ENTRY_POINT,
    vector_entry_point=_VECTOR_ENTRY_POINT,
    kwargs={"tokenizer": None, "reward_model": None, "prompts": None},
)
_gym.register(
    id="TextGen-Toy-v0",
    entry_point=_ENTRY_POINT,
    vector_entry_point=_VECTOR_ENTRY_POINT,
    kwargs={
        "tokenizer": "toy",
        "reward_model": "toy-lexicon",
        "prompts": ["the film was", "this movie is so", "the plot", "a very"],
        "max_new_tokens": 8,
        "max_prompt_tokens": 4,
    },
)


def __getattr__(name: str) -> Any:
    if name in _LAZY_NAMES:
        return getattr(import_module(_LAZY_NAMES[name]), name)
    if name in _LAZY_MODULES:
        return import_module(f"tokenmdp.{name}")
    raise AttributeError(f"module 'tokenmdp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
