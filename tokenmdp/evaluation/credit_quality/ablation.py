"""Scores of texts with tokens left out: leave-one-out, and the deletion and insertion curves of an order of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tokenmdp.credit.deletion import scores_of_kept
from tokenmdp.evaluation.credit_quality.metrics import area_over_line
from tokenmdp.reward_models import RewardModel
from tokenmdp.types import Episode

TOKENS_PER_FORWARD = 16384
CURVE_STEPS = 8


class AblatedScores:
    """``scores(keep)[n, k]``: the score of text n with only the response tokens ``keep[n, k]``; each computed once.

    The others are left out, as if they had never been there; the prompt stays. With no token kept it is the score of
    the prompt alone.

    Args:
        model: the reward model.
        episodes: N texts.
    """

    def __init__(self, model: RewardModel, episodes: Episode) -> None:
        self._model, self._episodes = model, episodes
        self._known: dict[tuple[int, bytes], float] = {}

    def __call__(self, keep: torch.Tensor) -> torch.Tensor:
        """Scores (N, K) float64 of ``keep`` (N, K, H) bool."""
        rows = torch.arange(keep.shape[0])[:, None].expand(keep.shape[:2]).flatten()
        masks = (keep & self._episodes.response_mask[:, None]).flatten(0, 1)  # (N * K, H)
        keys = [(row, mask.tobytes()) for row, mask in zip(rows.tolist(), masks.numpy(), strict=True)]
        new = {key: place for place, key in enumerate(keys) if key not in self._known}
        if new:
            places = torch.tensor(list(new.values()))
            found = scores_of_kept(
                self._model,
                self._episodes,
                rows[places],
                masks[places],
                TOKENS_PER_FORWARD // self._episodes.input_ids.shape[1] + 1,
            )
            self._known.update(zip(new, found.tolist(), strict=True))
        return torch.tensor([self._known[key] for key in keys], dtype=torch.float64).view(keep.shape[:2])


def leave_one_out(scores: AblatedScores, mask: torch.Tensor) -> torch.Tensor:
    """``importance[t] = score - score of the text without token t``, 0 outside the response; (N, H) float64."""
    without = mask[:, None] & ~torch.eye(mask.shape[1], dtype=torch.bool)  # (N, H, H)
    every = scores(torch.cat([mask[:, None], without], dim=1))  # (N, 1 + H)
    return torch.where(mask, every[:, :1] - every[:, 1:], 0.0)


class Areas(NamedTuple):
    """How much earlier than a random order an order of tokens destroys and rebuilds the score, (N,) each."""

    deletion: torch.Tensor
    insertion: torch.Tensor


def curve_areas(
    scores: AblatedScores, order: torch.Tensor, mask: torch.Tensor, score: torch.Tensor, scale: torch.Tensor
) -> Areas:
    """Deletion and insertion: leave tokens out, or put them back, first those that the credit says carry the score.

    ``deletion = sign(score) * integral over u in [0, 1] of (line(u) - score without the first u T tokens) / scale``
    ``insertion = sign(score) * integral over u in [0, 1] of (score with the first u T tokens only - line(u)) / scale``

    The line joins the score of the whole text and that of the prompt alone. With ``scale = sum_t |reference[t]|``, a
    score that is the sum of its tokens' parts gives numbers in [-1/2, 1/2], 0 for a random order. The curves are read
    at ``CURVE_STEPS`` equal steps (each token is one in shorter texts).

    Source: Petsiuk et al., "RISE", BMVC 2018, whose areas are over the raw curve; line, sign and scale are ours, since
    scores here have signs and no natural range.

    Args:
        scores: of the N texts.
        order: (N, H) as `credit_order` gives it.
        mask: (N, H) bool.
        score: (N,) of the whole texts.
        scale: (N,) positive; NaN or 0 gives NaN.
    """
    length = mask.sum(-1, keepdim=True)
    steps = torch.arange(CURVE_STEPS + 1) / CURVE_STEPS
    taken = (steps * length).round().long()  # (N, K + 1)
    first = order[:, None] < taken[..., None]  # (N, K + 1, H)
    fractions = taken.double() / length
    sign = torch.where(score < 0, -1.0, 1.0).double()
    unit = sign / torch.where(scale > 0, scale.double(), torch.nan)
    kept = mask[:, None]
    deletion = -unit * area_over_line(scores(kept & ~first), fractions)
    insertion = unit * area_over_line(scores(kept & first), fractions)
    return Areas(deletion, insertion)
