"""Credit by what each token added to the score of the text so far (RED)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenmdp.credit.base import MissingResource, Resources
from tokenmdp.credit.weights import check_credit_beta, conserve
from tokenmdp.types import Credit, Outcome


def prefix_differences(prefix_scores: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """``rho[t] = prefix_scores[t + 1] - prefix_scores[t]``, 0 outside the response; (..., T + 1) -> (..., T).

    ``prefix_scores[t]`` is the score of the prompt and the first t response tokens.

    >>> prefix_differences(torch.tensor([0.5, 2.0, 1.0]), torch.tensor([True, True])).tolist()
    [1.5, -1.0]
    """
    if prefix_scores.shape[-1] != response_mask.shape[-1] + 1:
        raise ValueError(
            f"prefix_scores {tuple(prefix_scores.shape)} and response_mask {tuple(response_mask.shape)} differ: there "
            "is one prefix more than response slots, the empty response"
        )
    return torch.where(response_mask, prefix_scores.diff(dim=-1), 0.0)


@dataclass(frozen=True)
class PrefixDifferenceCredit:
    """``token_rewards[t] = credit_beta * (score of y[<=t] - score of y[<t]) + ...`` (RED).

    The rest of the score, that of the prompt alone and ``1 - credit_beta`` of the sum, goes to the last token (see
    `conserve`), so the sum is the score and this is potential-based shaping with
    ``phi(s[t]) = credit_beta * (score of y[<t] - score of the prompt)``: with gamma = 1 the reward-to-go gradient stays
    unbiased (with another gamma the sum of discounted rewards is no longer the discounted score). GAE estimates it with
    lambda 1; with a smaller one a critic's errors bias it, as they do with sparse credit.
    Reports ``prompt_score``, the score of the prompt alone.

    Source: Li et al., "RED: Unleashing Token-Level Rewards from Holistic Feedback via Reward Redistribution", 2024,
    which leaves out the prompt's score; that shifts the return of a prompt's episodes by a constant.

    Args:
        credit_beta: 0 is sparse, 1 is dense only.
    """

    credit_beta: float = 1.0
    name: ClassVar[str] = "red"
    conserves_return: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    potential_based: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"prefix_scores"})

    def __post_init__(self) -> None:
        check_credit_beta(self.credit_beta)

    def __call__(self, outcome: Outcome, resources: Resources) -> Credit:
        """Token rewards (N, H) of any sign, and the report."""
        prefix_scores, mask = outcome.reward.prefix_scores, outcome.episode.response_mask
        if prefix_scores is None:
            raise MissingResource(
                "the reward model returned no prefix scores; use a causal one, which provides them, or another credit "
                "method (in the command, --credit attention)"
            )
        rho = prefix_differences(prefix_scores, mask)
        report = {"prompt_score": prefix_scores[..., 0]}
        return Credit(conserve(rho, outcome.reward.score, mask, self.credit_beta), report)
