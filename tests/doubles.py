"""Reward models whose numbers are exact and depend on the row's tokens only, for tests of the environments."""

from __future__ import annotations

import torch

from tokenmdp.loading import load_tokenizer
from tokenmdp.reward_models import RewardModel
from tokenmdp.types import Episode, RewardOutput


class HashRewardModel(RewardModel):
    """Pseudo-random scores in [-5, 5) and attention rows, by integer arithmetic; remembers what it was asked."""

    provides = frozenset({"attention"})

    def __init__(self) -> None:
        super().__init__(load_tokenizer("toy"))
        self.asked: list[tuple[list[list[int]], bool]] = []  # per call: the texts, and whether attention was asked

    def evaluate(self, episodes: Episode, attention: bool) -> RewardOutput:
        texts = [row[mask].tolist() for row, mask in zip(episodes.input_ids, episodes.attention_mask, strict=True)]
        self.asked.append((texts, attention))
        places = torch.arange(episodes.input_ids.shape[1]) + 1
        kept = episodes.input_ids * episodes.attention_mask
        score = ((kept * places * 7919).sum(-1) % 1000) / 100 - 5
        row = ((kept + 1) * places * 104729 % 97 + 1) / 97 * episodes.attention_mask
        row = row / row.sum(-1, keepdim=True)
        return RewardOutput(score, row[:, episodes.prompt_slots :] * episodes.response_mask if attention else None)


class ConstantAttention(HashRewardModel):
    """The same scores; every token of the text gets the same attention."""

    def evaluate(self, episodes: Episode, attention: bool) -> RewardOutput:
        score = super().evaluate(episodes, attention).score
        row = episodes.attention_mask / episodes.attention_mask.sum(-1, keepdim=True)
        return RewardOutput(score, row[:, episodes.prompt_slots :] * episodes.response_mask if attention else None)


class SinkAttention(HashRewardModel):
    """Attention that all goes to the prompt."""

    def evaluate(self, episodes: Episode, attention: bool) -> RewardOutput:
        score = super().evaluate(episodes, attention).score
        return RewardOutput(score, torch.zeros(episodes.response_mask.shape) if attention else None)


class ScoreOnly(HashRewardModel):
    """Provides nothing but the score."""

    provides = frozenset()
