"""The sizes that are measured, and the models, environments and agents of those sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import tokenmdp  # noqa: F401  registers the environments
from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.envs.text_rows import read_rows
from tokenmdp.models.loading import load_causal_lm, load_tokenizer
from tokenmdp.models.names import resolve
from tokenmdp.reward_models import HFRewardModel, RewardModel
from tokenmdp.reward_models.loading import load_reward_model
from tokenmdp.types import Episode, RewardOutput
from tokenmdp.wrappers import vector

POSITIONS = 1024
NUM_PROMPTS = 256  # distinct prompts to draw from


@dataclass(frozen=True)
class Shape:
    """One size: a GPT-2 with random weights, or the bundled model; the batch; the update."""

    name: str
    layers: int
    width: int
    heads: int
    vocab_size: int
    episodes: int  # a rollout
    prompt_tokens: int
    response_tokens: int  # every response has exactly this many: none may end early
    num_minibatches: int = 4
    update_epochs: int = 4
    bundled: bool = False

    @property
    def tokens(self) -> int:
        """Response tokens of a rollout."""
        return self.episodes * self.response_tokens

    def config(self) -> GPT2Config:
        """Dropout is off: it would cost one side only."""
        return GPT2Config(**self.model_arguments())

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of a GPT2Config, the same for every version of transformers."""
        return {
            "n_layer": self.layers, "n_embd": self.width, "n_head": self.heads, "vocab_size": self.vocab_size,
            "n_positions": POSITIONS, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
            "bos_token_id": 0, "eos_token_id": 0,
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """For the report and the other process."""
        return asdict(self)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("bundled", 4, 256, 4, 4096, episodes=64, prompt_tokens=8, response_tokens=24, bundled=True),
        Shape("4x256", 4, 256, 4, 4096, episodes=64, prompt_tokens=8, response_tokens=24),
        Shape("gpt2", 12, 768, 12, 50257, episodes=16, prompt_tokens=8, response_tokens=16),
        Shape("gpt2-64", 12, 768, 12, 50257, episodes=64, prompt_tokens=8, response_tokens=24),
        Shape("smoke", 1, 16, 2, 64, episodes=4, prompt_tokens=2, response_tokens=3, num_minibatches=2),
    )
}


class FixedScore(RewardModel):
    """A score that costs nothing, for where the reward model is not the subject: the last token's share of V."""

    def evaluate(self, episodes: Episode, needs: frozenset[str]) -> RewardOutput:
        """The number has no meaning; it differs from row to row so that advantages do."""
        return RewardOutput(episodes.input_ids[:, -1].float() / len(self.tokenizer))


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of ``vocab_size`` made-up words; id 0 ends the text.

    >>> len(word_tokenizer(10))
    10
    """
    words = {"<eos>": 0} | {f"w{index}": index for index in range(1, vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<eos>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )


def make_prompts(shape: Shape) -> list[list[int]]:
    """Token ids, all of the shape's length: bundled prompts, or random ids, none of which ends a text."""
    if shape.bundled:
        encode = load_tokenizer("imdb-tiny").encode
        encoded = [encode(text) for text in read_rows(Path(resolve("prompts", "imdb-tiny")))]
        return [ids for ids in encoded if len(ids) == shape.prompt_tokens]
    ids = np.random.default_rng(0).integers(1, shape.vocab_size, (NUM_PROMPTS, shape.prompt_tokens))
    return ids.tolist()


def make_policy(shape: Shape) -> PreTrainedModel:
    """The same weights at every call, in float32."""
    if shape.bundled:
        return load_causal_lm("imdb-tiny", dtype=torch.float32)
    torch.manual_seed(0)
    return GPT2LMHeadModel(shape.config())


def make_reward_model(shape: Shape, device: str) -> RewardModel:
    """A classifier of the policy's size: the bundled one, or one with random weights."""
    if shape.bundled:
        return load_reward_model("imdb-tiny", device=device)
    torch.manual_seed(1)
    config = shape.config()
    config.num_labels, config.pad_token_id = 1, 0
    return HFRewardModel(GPT2ForSequenceClassification(config).to(device), word_tokenizer(shape.vocab_size))


def make_envs(
    shape: Shape, reward_model: RewardModel | None = None, credit: str = "sparse", shortest: int | None = None
) -> VectorEnv:
    """Environments whose prompts and responses all have the shape's lengths; by default the score is free.

    With ``shortest`` the lengths of responses are drawn evenly from there to the shape's.
    """
    lengths = {} if shortest is None else {"horizon_range": (shortest, shape.response_tokens)}
    tokenizer = load_tokenizer("imdb-tiny") if shape.bundled else word_tokenizer(shape.vocab_size)
    envs = gym.make_vec(
        "tokenmdp:TextGen-v0", num_envs=shape.episodes, autoreset_mode="Disabled", score_when="all_done",
        tokenizer=tokenizer, reward_model=reward_model or FixedScore(tokenizer), prompts=make_prompts(shape),
        max_prompt_tokens=shape.prompt_tokens, max_new_tokens=shape.response_tokens,
        min_new_tokens=shape.response_tokens if shortest is None else shortest, **lengths,
    )  # fmt: skip
    return vector.CreditReward(envs, credit)


def make_agent(shape: Shape, envs: VectorEnv, dtype: str, device: str, **options: Any) -> PPO:
    """The agent as its users make it; ``options`` are further fields of its configuration."""
    config = PPOConfig(
        update_epochs=shape.update_epochs, num_minibatches=shape.num_minibatches, dtype=dtype, device=device, **options
    )
    return PPO(make_policy(shape), envs, config)
