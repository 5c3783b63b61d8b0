"""Reward models whose numbers are exact and depend on the row's tokens only, and episodes made of words."""

from __future__ import annotations

import torch

from tokenmdp.loading import load_tokenizer, toy_tokenizer
from tokenmdp.reward_models import RewardModel
from tokenmdp.types import Episode, RewardOutput


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
