"""Reward models: Hugging Face classifiers, word lists, and the base class of your own."""

from tokenmdp.reward_models.base import NonFiniteScore, RewardModel, VocabularyMismatch, load_reward_model
from tokenmdp.reward_models.hf import HFRewardModel
from tokenmdp.reward_models.lexicon import LexiconRewardModel, toy_lexicon

__all__ = [
    "HFRewardModel",
    "LexiconRewardModel",
    "NonFiniteScore",
    "RewardModel",
    "VocabularyMismatch",
    "load_reward_model",
    "toy_lexicon",
]
