"""Prefix differences while the episode runs: what the single and the vector form of `OnlinePrefixReward` share."""

from __future__ import annotations

import numpy as np
import torch

from tokenmdp.env import TokenEpisodes


class PrefixLedger:
    """What N episodes in progress have been paid: ``credit_beta * (score of y[<=t] - score of y[<t])`` for token t.

    Args:
        base: the unwrapped environment.
        num_rows: N.
        credit_beta: the dense share.
    """

    def __init__(self, base: TokenEpisodes, num_rows: int, credit_beta: float) -> None:
        self._base, self._credit_beta = base, credit_beta
        self._score = np.zeros(num_rows, dtype=np.float64)  # of the text so far
        self._paid = np.zeros((num_rows, base.task.max_new_tokens), dtype=np.float64)

    def start(self, rows: np.ndarray) -> None:
        """New episodes in ``rows`` (n,) int64. A given ``response_prefix`` is paid for, on its last token."""
        episodes = self._base.episodes_so_far(rows)
        silent = torch.zeros_like(episodes.response_mask)
        asked = torch.cat([episodes.attention_mask[:, : episodes.prompt_slots], silent], dim=1)
        alone = self._base.task.reward_model(
            episodes._replace(attention_mask=asked, response_mask=silent), empty_responses=True
        ).score.double()
        self._score[rows], self._paid[rows] = alone.numpy(), 0.0
        given = rows[episodes.response_mask.any(-1).numpy()]
        if given.size:
            self.pay(given)

    def pay(self, rows: np.ndarray) -> np.ndarray:
        """The rewards (n,) float64 of the tokens that the running ``rows`` have just got; one reward-model call."""
        episodes = self._base.episodes_so_far(rows)
        score = self._base.task.reward_model(episodes).score.double().numpy()
        rewards = self._credit_beta * (score - self._score[rows])
        self._score[rows] = score
        self._paid[rows, episodes.response_mask.sum(-1).numpy() - 1] = rewards
        return rewards

    def close(self, rows: np.ndarray, score: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The rewards (n,) float64 of the last tokens: what is left of the scores (n,); no reward-model call."""
        rewards = score.astype(np.float64) - self._paid[rows].sum(-1)
        self._paid[rows, lengths - 1] = rewards
        return rewards

    def paid(self, rows: np.ndarray) -> np.ndarray:
        """All rewards of the episodes in ``rows``, (n, H) float32."""
        return self._paid[rows].astype(np.float32)
