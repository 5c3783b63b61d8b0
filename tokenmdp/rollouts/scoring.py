"""What a model says of all response tokens of a rollout, some rows of like length at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.training.batches import by_length, row_lengths
from tokenmdp.types import Rollout


@torch.no_grad()
def score_under(policy: CausalLMPolicy, rollout: Rollout, rows_per_forward: int = 64) -> torch.Tensor:
    """Log-probabilities (N, H) of a rollout's response tokens under another policy, 0 outside the response."""

    def logprobs(part: Rollout) -> torch.Tensor:
        return policy.evaluate(part.input_ids, part.attention_mask, part.prompt_slots, part.support).logprobs

    return _by_rows(logprobs, rollout, rows_per_forward)


@torch.no_grad()
def values_of(policy: CausalLMPolicy, rollout: Rollout, rows_per_forward: int = 64) -> torch.Tensor:
    """Values (N, H) of a rollout's response tokens by the policy's value model, 0 outside the response."""

    def values(part: Rollout) -> torch.Tensor:
        return policy.values(part.input_ids, part.attention_mask, part.prompt_slots)

    return _by_rows(values, rollout, rows_per_forward)


def _by_rows(score: Callable[[Rollout], torch.Tensor], rollout: Rollout, rows_per_forward: int) -> torch.Tensor:
    lengths, found = row_lengths(rollout), torch.zeros_like(rollout.logprobs)
    sorted_rows = torch.from_numpy(lengths.sum(1).argsort(kind="stable"))
    for rows in sorted_rows.split(rows_per_forward):
        for members, part in by_length(rollout, rows, lengths, forward_slots=math.inf):
            scored = score(part)
            found[members, : scored.shape[1]] = scored * part.response_mask
    return found
