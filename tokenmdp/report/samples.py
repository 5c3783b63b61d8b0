"""Finished episodes as readable text: one record a sample, one piece of text a token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokenmdp.models.tokens import token_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tokenmdp.types import Rollout


@dataclass(frozen=True)
class Sample:
    """One finished episode as text; ``tokens[t]`` and ``credits[t]`` belong to response token t."""

    prompt: str
    tokens: list[str]
    credits: list[float]
    score: float
    facts: dict[str, float] = field(default_factory=dict)  # further numbers to show, such as kl

    @property
    def text(self) -> str:
        """The prompt and the response as one string."""
        return self.prompt + "".join(self.tokens)


def samples_from_rollout(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """One `Sample` an episode, with ``kl = sum_t (logprobs[t] - ref_logprobs[t])`` in nats among its facts."""
    prompt_slots = rollout.prompt_slots
    kl = ((rollout.logprobs - rollout.ref_logprobs) * rollout.response_mask).sum(-1)
    samples = []
    for row in range(rollout.input_ids.shape[0]):
        kept = rollout.attention_mask[row].bool()
        prompt_ids = rollout.input_ids[row, :prompt_slots][kept[:prompt_slots]].tolist()
        mask = rollout.response_mask[row].bool()
        prompt, pieces = token_pieces(tokenizer, rollout.input_ids[row, prompt_slots:][mask].tolist(), prompt_ids)
        credits = rollout.token_rewards[row][mask].tolist()
        samples.append(Sample(prompt, pieces, credits, rollout.scores[row].item(), {"kl": kl[row].item()}))
    return samples
