"""The two baselines: everything on the last token, and the same on every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenmdp.credit.base import Resources
from tokenmdp.credit.weights import blend, check_credit_beta, redistribute, sparse_weights, uniform_weights
from tokenmdp.types import Credit, Outcome


@dataclass(frozen=True)
class SparseCredit:
    """``token_rewards[t] = score * 1[t = last]``: plain RLHF."""

    name: ClassVar[str] = "sparse"
    conserves_return: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    potential_based: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, outcome: Outcome, resources: Resources) -> Credit:
        """Token rewards (N, H), all of it on the last response token."""
        return Credit(redistribute(outcome.reward.score, sparse_weights(outcome.episode.response_mask)), {})


@dataclass(frozen=True)
class UniformCredit:
    """``token_rewards[t] = score * (credit_beta / T + (1 - credit_beta) * 1[t = last])`` over the T response tokens.

    Args:
        credit_beta: 0 is sparse, 1 is the same on every token. What is compared with it must have the same value: a
            part that stays on the last token helps by itself.
    """

    credit_beta: float = 1.0
    name: ClassVar[str] = "uniform"
    conserves_return: ClassVar[bool] = True
    causal: ClassVar[bool] = False
    potential_based: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_credit_beta(self.credit_beta)

    def __call__(self, outcome: Outcome, resources: Resources) -> Credit:
        """Token rewards (N, H), the same on every response token but the last."""
        mask = outcome.episode.response_mask
        return Credit(redistribute(outcome.reward.score, blend(uniform_weights(mask), mask, self.credit_beta)), {})
