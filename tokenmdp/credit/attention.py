"""Credit that follows attention: the reward model's own (ABC) and the policy's (ABC-D).

Source: Chan et al., "Dense Reward for Free in RLHF", ICML 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenmdp.credit.base import MissingResource, Resources
from tokenmdp.credit.draws import generator_for
from tokenmdp.credit.options import check_number, check_whole
from tokenmdp.credit.weights import (
    ATTENTION_FLOOR,
    attention_weights,
    blend,
    check_credit_beta,
    redistribute,
    row_entropy,
    sharpened,
    shuffled_rows,
)
from tokenmdp.types import Credit, Episode, Outcome

HEADS = ("mean", "max")


@dataclass(frozen=True)
class AttentionCredit:
    """``token_rewards[t] = score * (credit_beta * alpha[t] + (1 - credit_beta) * 1[t = last])`` (ABC).

    alpha is the row of the token that the reward model pools, restricted to the response and renormalised. Reports
    ``attention_mass`` (the share of the row on the response, before renormalising), ``attention_entropy`` (of alpha, as
    a share of its maximum: near 1 the method is nearly uniform credit) and ``credit_fallback`` (True where the mass
    was below ``attention_floor`` and alpha is uniform).

    Args:
        credit_beta: 0 is sparse, 1 is dense only.
        attention_floor: the least response mass that is trusted.
        layer: which layer's row; the paper's is the last, -1.
        heads: "mean" (the paper's), "max", or the index of one head.
        sharpness: alpha is raised to this power and renormalised: above 1 it has higher peaks, below 1 it is flatter.
        shuffled: alpha's values in random order over the response: the peaks of the row without its content. A control.
        seed: of that order, together with the text's own token ids, so that it does not depend on the batch.
    """

    credit_beta: float = 0.8
    attention_floor: float = ATTENTION_FLOOR
    layer: int = -1
    heads: str | int = "mean"
    sharpness: float = 1.0
    shuffled: bool = False
    seed: int = 0
    name: ClassVar[str] = "attention"
    conserves_return: ClassVar[bool] = True
    causal: ClassVar[bool] = False
    potential_based: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    def __post_init__(self) -> None:
        check_credit_beta(self.credit_beta)
        _check_floor(self.attention_floor)
        check_whole("layer", self.layer)
        check_whole("heads", self.heads, 0, HEADS)
        check_number("sharpness", self.sharpness)
        if not 0.0 < self.sharpness < math.inf:
            raise ValueError(f"sharpness is {self.sharpness}; it is a power of the weights and must be positive")
        if not isinstance(self.shuffled, bool):
            raise ValueError(f"shuffled is {self.shuffled!r}; choose true or false")
        check_whole("seed", self.seed)
        if not self.reads_default_row:
            # An instance's own entry: only a row other than the paper's costs the capture of every layer.
            object.__setattr__(self, "needs", frozenset({"attention_layers"}))

    @property
    def reads_default_row(self) -> bool:
        """The last layer, averaged over heads."""
        return self.layer == -1 and self.heads == "mean"

    def __call__(self, outcome: Outcome, resources: Resources) -> Credit:
        """Token rewards (N, H) that follow the attention row, and the report."""
        mask = outcome.episode.response_mask
        alpha, mass, fell_back = attention_weights(self._row(outcome), mask, self.attention_floor)
        if self.sharpness != 1.0:
            alpha = sharpened(alpha, self.sharpness)
        if self.shuffled:
            alpha = shuffled_rows(alpha, mask, [generator_for(ids, self.seed) for ids in texts(outcome.episode)])
        report = {
            "attention_mass": mass.float(),
            "attention_entropy": row_entropy(alpha, mask).float(),
            "credit_fallback": fell_back,
        }
        return Credit(redistribute(outcome.reward.score, blend(alpha, mask, self.credit_beta)), report)

    def _row(self, outcome: Outcome) -> torch.Tensor:
        """(N, H)."""
        reward = outcome.reward
        if self.reads_default_row:
            if reward.attention is None:
                raise MissingResource(
                    "the reward model returned no attention row; use one that provides it, or UniformReward"
                )
            return reward.attention
        if reward.attention_layers is None:
            raise MissingResource(
                f"the reward model returned no rows of single layers and heads, which layer={self.layer}, "
                f"heads={self.heads!r} need; use one that provides them, or layer=-1, heads='mean'"
            )
        layers, heads = reward.attention_layers.shape[1:3]  # (N, layers, heads, H)
        if not -layers <= self.layer < layers:
            raise ValueError(f"layer is {self.layer} and the reward model has {layers}; choose {-layers}..{layers - 1}")
        rows = reward.attention_layers[:, self.layer]  # (N, heads, H)
        if self.heads == "mean":
            return rows.mean(1)
        if self.heads == "max":
            return rows.amax(1)
        if int(self.heads) >= heads:
            raise ValueError(f"heads is {self.heads} and the layer has {heads}; choose 0..{heads - 1}")
        return rows[:, int(self.heads)]


@dataclass(frozen=True)
class PolicyAttentionCredit:
    """ABC with the policy's own last-layer attention, every column averaged over the steps that can read it (ABC-D).

    ``alpha[k] ~ mean over q = k .. T-2 of attention[q, k]``, renormalised to 1. Before it chooses token q + 1 the
    policy has read tokens 0 .. q. The last token is never read, so its alpha is 0. A response of a single token is
    never read at all: alpha is 1 there, and ``credit_fallback`` says so. (The reference implementation credits token
    k + 1 with what token k earned, and gives NaN for one token.)

    Args:
        credit_beta: 0 is sparse, 1 is dense only.
        attention_floor: the least response mass per step that is trusted.
    """

    credit_beta: float = 0.8
    attention_floor: float = ATTENTION_FLOOR
    name: ClassVar[str] = "abc-d"
    conserves_return: ClassVar[bool] = True
    causal: ClassVar[bool] = False
    potential_based: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"policy_attention"})

    def __post_init__(self) -> None:
        check_credit_beta(self.credit_beta)
        _check_floor(self.attention_floor)

    def __call__(self, outcome: Outcome, resources: Resources) -> Credit:
        """Token rewards (N, H) and the report, as for `AttentionCredit`."""
        if resources.policy_attention is None:
            raise MissingResource(
                f"{self.name} credit reads the live policy's attention and no agent has attached one; train with an "
                "agent of tokenmdp.agents, or set env.unwrapped.policy_attention = "
                "tokenmdp.models.policy_attention.ForwardAttention(policy)"
            )
        mask = outcome.episode.response_mask
        attention = resources.policy_attention(outcome)  # (N, H, H)
        if attention.shape != (*mask.shape, mask.shape[-1]):
            raise ValueError(
                f"policy_attention gave {tuple(attention.shape)} for a response mask {tuple(mask.shape)}; (N, H, H) is "
                "needed: [n, q, k] for what was read of token k after token q"
            )
        row = self._row(attention.to(mask.device), mask)
        alpha, mass, fell_back = attention_weights(row, mask, self.attention_floor)
        report = {
            "attention_mass": mass.float(),
            "attention_entropy": row_entropy(alpha, mask).float(),
            "credit_fallback": fell_back,
        }
        return Credit(redistribute(outcome.reward.score, blend(alpha, mask, self.credit_beta)), report)

    def _row(self, attention: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return mean_column(attention, mask)


@dataclass(frozen=True)
class LastPolicyAttentionCredit(PolicyAttentionCredit):
    """ABC with the policy's attention in the last step's row alone (ABC-D2): ``alpha[k] ~ attention[T-2, k]``.

    All else is as in `PolicyAttentionCredit`.
    """

    name: ClassVar[str] = "abc-d2"

    def _row(self, attention: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return last_row(attention, mask)


def texts(episode: Episode) -> list[torch.Tensor]:
    """The token ids of each prompt and response, without padding: N of (T,) int64."""
    return [ids[seen] for ids, seen in zip(episode.input_ids, episode.attention_mask.bool(), strict=True)]


def readers(mask: torch.Tensor) -> torch.Tensor:
    """Which rows q of a policy's attention were used to choose a token: all but the last token's; (..., T) bool.

    >>> readers(torch.tensor([True, True, False])).tolist()
    [True, False, False]
    """
    following = torch.zeros_like(mask)
    following[..., :-1] = mask[..., 1:]
    return mask & following


def mean_column(attention: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``mean over the rows q >= k that chose a token, of attention[q, k]``; 0 for the last token.

    (..., T, T) -> (..., T). The divisor is the number of rows that *can* read column k, not the number of entries that
    happen not to be zero.

    >>> attention = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.8, 0.0], [9.0, 9.0, 9.0]])
    >>> [round(weight, 4) for weight in mean_column(attention, torch.tensor([True, True, True])).tolist()]
    [0.6, 0.8, 0.0]
    """
    size = mask.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=mask.device).tril()  # [q, k]: k <= q
    used = readers(mask)[..., :, None] & below & mask[..., None, :]
    total = torch.where(used, attention.double(), 0.0).sum(-2)
    return total / used.sum(-2).clamp(min=1)


def last_row(attention: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``attention[T-2]``, the row that chose the last token; 0 for that token. (..., T, T) -> (..., T).

    >>> attention = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.8, 0.0], [9.0, 9.0, 9.0]])
    >>> [round(weight, 4) for weight in last_row(attention, torch.tensor([True, True, True])).tolist()]
    [0.2, 0.8, 0.0]
    """
    before_last = (mask.sum(-1) - 2).clamp(min=0)
    index = before_last[..., None, None].expand(*before_last.shape, 1, mask.shape[-1])
    row = attention.double().gather(-2, index).squeeze(-2)  # (..., T)
    return torch.where(readers(mask), row, 0.0)  # also all zero for a response of one token


def _check_floor(attention_floor: float) -> None:
    check_number("attention_floor", attention_floor)
    if not attention_floor > 0.0:
        raise ValueError(f"attention_floor is {attention_floor}; it must be positive (default 1e-3)")
