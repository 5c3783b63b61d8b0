"""The reward model's opinion of responses with tokens left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tokenmdp.types import Episode

if TYPE_CHECKING:
    from tokenmdp.reward_models import RewardModel


def scores_of_kept(
    model: RewardModel, episode: Episode, rows: torch.Tensor, keep: torch.Tensor, rows_per_forward: int
) -> torch.Tensor:
    """``scores[m]`` of the prompt of episode ``rows[m]`` and those of its response tokens that ``keep[m]`` keeps.

    A deleted token leaves no gap: the model reads its neighbours as if it had never been there. A response with no
    tokens kept has the score of its prompt.

    Args:
        model: shares the tokens of the episodes.
        episode: N finished episodes.
        rows: (M,) int64.
        keep: (M, H) bool; what it says outside the response does not matter.
        rows_per_forward: how many of the M texts the model reads at a time.

    Returns:
        (M,) float32.
    """
    if not len(rows):
        return torch.zeros(0)
    scores = []
    for chosen, kept in zip(rows.split(rows_per_forward), keep.split(rows_per_forward), strict=True):
        response_mask = episode.response_mask[chosen].bool() & kept
        prompt_mask = episode.attention_mask[chosen, : episode.prompt_slots].bool()
        texts = Episode(episode.input_ids[chosen], torch.cat([prompt_mask, response_mask], -1), response_mask)
        scores.append(model(texts, empty_responses=True).score)
    return torch.cat(scores)
