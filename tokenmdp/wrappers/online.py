"""Prefix differences while the episode runs: what the single and the vector form of `OnlinePrefixReward` share."""

from __future__ import annotations

import numpy as np

from tokenmdp.envs.single import TokenEpisodes


class PrefixLedger:
    """The rewards of N episodes in progress: ``credit_beta * (score of y[<=t] - score of y[<t])`` for token t.

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
        """New episodes in ``rows`` (n,) int64, which begin after their prompt or their ``response_prefix``."""
        episodes = self._base.episodes_so_far(rows)
        self._score[rows] = self._base.task.reward_model(episodes, empty_responses=True).score.double().numpy()
        self._paid[rows] = 0.0

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
