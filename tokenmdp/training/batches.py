"""Episodes of similar length together, so that a forward spends little on padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from tokenmdp.types import Rollout

# The cost of one more forward and backward, in slots: reading every weight again and launching every kernel.
FORWARD_SLOTS = 256


def length_groups(prompts: np.ndarray, responses: np.ndarray, forward_slots: float = FORWARD_SLOTS) -> list[np.ndarray]:
    """Split episodes into groups with the least ``sum over groups of size * longest + forward_slots``.

    ``longest`` is a group's longest prompt plus its longest response, because prompts end and responses begin in one
    column. Groups are runs of the episodes sorted by length, among which the best split is found exactly.

    Args:
        prompts: (n,) slots of each prompt.
        responses: (n,) slots of each response.
        forward_slots: what a group costs by itself.

    >>> prompts = np.array([4, 4, 4, 4])
    >>> [group.tolist() for group in length_groups(prompts, np.array([96, 4, 100, 6]), forward_slots=50)]
    [[1, 3], [0, 2]]
    """
    order = np.argsort(prompts + responses, kind="stable")
    prompts, responses = prompts[order], responses[order]
    best, first = [0.0], [0]  # of the first k episodes: the least cost, and where the last group of that split begins
    for end in range(1, len(order) + 1):
        prompt = np.maximum.accumulate(prompts[:end][::-1])[::-1]  # the longest from each start to the end
        response = np.maximum.accumulate(responses[:end][::-1])[::-1]
        costs = np.array(best) + (end - np.arange(end)) * (prompt + response) + forward_slots
        first.append(int(costs.argmin()))
        best.append(float(costs.min()))
    groups, end = [], len(order)
    while end:
        groups.append(order[first[end] : end])
        end = first[end]
    return groups[::-1]


def by_length(
    rollout: Rollout, rows: torch.Tensor, lengths: np.ndarray, forward_slots: float = FORWARD_SLOTS
) -> Iterator[tuple[torch.Tensor, Rollout]]:
    """The episodes ``rows`` (n,) of a rollout in `length_groups`: which they are, and they alone without padding.

    ``rows`` and ``lengths``, those of `row_lengths`, are on the host, where groups are made; which rows a group has is
    said on the rollout's device. An infinite ``forward_slots`` makes one group.
    """
    at = rows.numpy()
    groups = [at[group] for group in length_groups(lengths[at, 0], lengths[at, 1], forward_slots)]
    sent = torch.from_numpy(np.concatenate(groups)).to(rollout.scores.device)  # all groups at once
    for chosen, members in zip(groups, sent.split([len(group) for group in groups]), strict=True):
        prompt, response = lengths[chosen].max(0).clip(1).tolist()  # the slot before a response is read in any case
        yield members, select_rows(rollout, members, prompt, response)


def row_lengths(rollout: Rollout) -> np.ndarray:
    """Prompt and response tokens of each episode, (N, 2) int64 on the host."""
    prompt = rollout.attention_mask[:, : rollout.prompt_slots].sum(1)
    return torch.stack([prompt, rollout.response_mask.sum(1)], 1).cpu().numpy()


def select_rows(rollout: Rollout, rows: torch.Tensor, prompt: int, response: int) -> Rollout:
    """The episodes ``rows`` (n,) alone, in the last ``prompt`` columns of the prompt and the first ``response``."""
    columns = slice(rollout.prompt_slots - prompt, rollout.prompt_slots + response)
    parts: dict[str, Any] = {}
    for name, values in rollout._asdict().items():
        if values is None or name == "scores":
            parts[name] = None if values is None else values[rows]
        else:
            parts[name] = values[rows, columns if name in ("input_ids", "attention_mask") else slice(response)]
    return Rollout(**parts)
