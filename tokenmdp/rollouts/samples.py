"""The episodes of a rollout as readable text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenmdp.models.tokens import token_pieces
from tokenmdp.report.samples import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tokenmdp.types import Rollout


def samples_from_rollout(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """One `Sample` per episode, with ``kl = sum_t (logprobs[t] - ref_logprobs[t])`` in nats among its facts."""
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
