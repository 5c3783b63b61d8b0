"""Reward models whose numbers are exact and depend on the row's tokens only, episodes made of words, toy wrappers."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence

import tokenmdp.wrappers as single
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.tokens import toy_tokenizer
from tokenmdp.reward_models import RewardModel
from tokenmdp.types import Episode, RewardOutput
from tokenmdp.wrappers import vector

TOY = "tokenmdp:TextGen-Toy-v0"
SB3 = "needs the sb3 extra: pip install 'tokenmdp[sb3]'"  # why a test is skipped


class HashRewardModel(RewardModel):
    """Pseudo-random scores in [-5, 5) and attention rows, by integer arithmetic; remembers what it was asked."""

    provides = frozenset({"attention"})

    def __init__(self) -> None:
        super().__init__(load_tokenizer("toy"))
        self.asked: list[tuple[list[list[int]], bool]] = []  # per call: the texts, and whether attention was asked

    def evaluate(self, episodes: Episode, needs: frozenset[str]) -> RewardOutput:
        texts = [row[mask].tolist() for row, mask in zip(episodes.input_ids, episodes.attention_mask, strict=True)]
        self.asked.append((texts, "attention" in needs))
        places = torch.arange(episodes.input_ids.shape[1]) + 1
        kept = episodes.input_ids * episodes.attention_mask
        score = ((kept * places * 7919).sum(-1) % 1000) / 100 - 5
        row = ((kept + 1) * places * 104729 % 97 + 1) / 97 * episodes.attention_mask
        row = row / row.sum(-1, keepdim=True)
        row = row[:, episodes.prompt_slots :] * episodes.response_mask
        return RewardOutput(score, row if "attention" in needs else None)


class ConstantAttention(HashRewardModel):
    """The same scores; every token of the text gets the same attention."""

    def evaluate(self, episodes: Episode, needs: frozenset[str]) -> RewardOutput:
        score = super().evaluate(episodes, needs).score
        row = episodes.attention_mask / episodes.attention_mask.sum(-1, keepdim=True)
        row = row[:, episodes.prompt_slots :] * episodes.response_mask
        return RewardOutput(score, row if "attention" in needs else None)


class SinkAttention(HashRewardModel):
    """Attention that all goes to the prompt."""

    def evaluate(self, episodes: Episode, needs: frozenset[str]) -> RewardOutput:
        score = super().evaluate(episodes, needs).score
        return RewardOutput(score, torch.zeros(episodes.response_mask.shape) if "attention" in needs else None)


class ScoreOnly(HashRewardModel):
    """Provides nothing but the score."""

    provides = frozenset()


PAD = 31  # of the toy tokenizer


def episode(*texts, prompt_slots=4, horizon=6, side="left", pad=PAD):
    """Each text is (prompt ids, response ids)."""
    ids = torch.full((len(texts), prompt_slots + horizon), pad)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(texts):
        start = prompt_slots - len(prompt) if side == "left" else 0
        for first, tokens in ((start, prompt), (prompt_slots, response)):
            ids[row, first : first + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            mask[row, first : first + len(tokens)] = True
    return Episode(ids, mask, mask[:, prompt_slots:])


def words(text):
    return toy_tokenizer()(text)["input_ids"]


def of_words(*texts, **slots):
    return episode(*((words(prompt), words(response)) for prompt, response in texts), **slots)


each_wrapper = pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("SparseReward", {}),
        ("UniformReward", {}),
        ("AttentionCreditReward", {}),
        ("AttentionCreditReward", {"credit_beta": 0.0}),
        ("AttentionCreditReward", {"credit_beta": 1.0, "attention_floor": 0.01}),
    ],
    ids=str,
)


def wrapped(name, wrapper_kwargs=None, **kwargs):
    """The toy environment under the wrapper of this name."""
    return getattr(single, name)(gym.make(TOY, **kwargs), **(wrapper_kwargs or {}))


def wrapped_vec(name, wrapper_kwargs=None, num_envs=4, **kwargs):
    """Its vector form."""
    return getattr(vector, name)(gym.make_vec(TOY, num_envs=num_envs, **kwargs), **(wrapper_kwargs or {}))


def same(first, second):
    """Whether two of what `reset` or `step` return are equal in every entry, dtypes included."""
    return data_equivalence(first, second, exact=True)


def responses(count, horizon, eos, seed=0):
    """Random responses of every length 1..horizon; those shorter than the horizon end with end-of-text."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(29, size=(count, horizon))
    lengths = rng.integers(1, horizon + 1, size=count)
    tokens[np.arange(count), lengths - 1] = eos
    return tokens


def play(env, tokens, **reset):
    """One episode in a single environment: its last reward and info."""
    env.reset(**reset)
    for token in tokens:
        *_, reward, terminated, _, info = env.step(token)
        if terminated:
            return reward, info
    raise AssertionError("the episode did not end")
