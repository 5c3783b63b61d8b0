"""Reward models: Hugging Face classifiers, word lists, readers of other tokenizers' text, and the base class."""

from tokenmdp.models.tokens import VocabularyMismatch
from tokenmdp.reward_models.base import NonFiniteScore, RewardModel
from tokenmdp.reward_models.classifier import HFRewardModel
from tokenmdp.reward_models.ensemble import EnsembleRewardModel
from tokenmdp.reward_models.lexicon import LexiconRewardModel, toy_lexicon
from tokenmdp.reward_models.loading import load_reward_model
from tokenmdp.reward_models.retokenized import RetokenizedRewardModel, readable_by
from tokenmdp.reward_models.scaled import ScaledRewardModel

__all__ = [
    "EnsembleRewardModel",
    "HFRewardModel",
    "LexiconRewardModel",
    "NonFiniteScore",
    "RetokenizedRewardModel",
    "RewardModel",
    "ScaledRewardModel",
    "VocabularyMismatch",
    "load_reward_model",
    "readable_by",
    "toy_lexicon",
]
