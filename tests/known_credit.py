"""A credit whose token rewards can be written down in the step that takes the token, before any episode has ended."""

from dataclasses import dataclass
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch

from tokenmdp.types import Credit
from tokenmdp.wrappers import CreditReward

TOY, PROMPT_SLOTS, EOS = "tokenmdp:TextGen-Toy-v0", 4, 30


def true_reward(token, position):
    """The reward of response token number ``position``; never zero, so that a missing reward is noticed."""
    return ((token * 31 + position * 17) % 101 + 1) / 16


def position(obs):
    """The index of the response token to come, from what the learner sees: (..., S) -> (...)."""
    return obs["attention_mask"][..., PROMPT_SLOTS:].sum(-1)


@dataclass(frozen=True)
class KnownCredit:
    name: ClassVar[str] = "known"
    conserves_return: ClassVar[bool] = False
    causal: ClassVar[bool] = True
    potential_based: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, outcome, resources):
        response = outcome.episode.input_ids[:, PROMPT_SLOTS:]
        rewards = true_reward(response, torch.arange(response.shape[1])) * outcome.episode.response_mask
        return Credit(rewards.float(), {})


def single(**arguments):
    return CreditReward(gym.make(TOY, **arguments), KnownCredit())


def often_ending(rng, num_envs):
    """Random tokens; about every sixth ends its text."""
    return np.where(rng.random(num_envs) < 1 / 6, EOS, rng.integers(0, 30, num_envs))
