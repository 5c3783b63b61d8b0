"""Credit assignment: from one score at the end to one reward a token.

Weights are non-negative, zero outside the response and sum to one, so ``redistribute`` conserves the score. Every
function works on trailing axes: scores (...,), masks, weights and token rewards (..., T).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from tokenmdp.types import Credit, Outcome

ATTENTION_FLOOR = 1e-3  # below this response mass, dividing by it amplifies noise


def redistribute(score: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``token_rewards[t] = score * weights[t]``; computed in float64 and returned as float32.

    >>> redistribute(torch.tensor(2.0), torch.tensor([0.25, 0.75, 0.0])).tolist()
    [0.5, 1.5, 0.0]
    """
    return (score.double().unsqueeze(-1) * weights.double()).float()  # (...,), (..., T) -> (..., T)


def sparse_weights(response_mask: torch.Tensor) -> torch.Tensor:
    """``weights[t] = 1[t is the last response token]``.

    >>> sparse_weights(torch.tensor([True, True, False])).tolist()
    [0.0, 1.0, 0.0]
    """
    steps = torch.arange(response_mask.shape[-1], device=response_mask.device)
    last = torch.where(response_mask, steps, -1).amax(-1, keepdim=True)
    return (steps == last).double() * response_mask  # & mask: an empty response has no last token


def uniform_weights(response_mask: torch.Tensor) -> torch.Tensor:
    """``weights[t] = 1 / T`` over the T response tokens.

    >>> uniform_weights(torch.tensor([True, True, False])).tolist()
    [0.5, 0.5, 0.0]
    """
    mask = response_mask.double()
    return mask / mask.sum(-1, keepdim=True).clamp(min=1)


def attention_weights(
    attention: torch.Tensor, response_mask: torch.Tensor, floor: float = ATTENTION_FLOOR
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reward model's attention row restricted to the response: ``weights[t] = attention[t] / mass``.

    ``mass = sum_t attention[t]`` over the response. Where ``mass < floor`` the row says nothing about the response
    (an attention sink took it all) and the weights are uniform instead.

    Returns:
        weights (..., T) float64, mass (...,) float64, fell_back (...,) bool.

    >>> weights, mass, fell_back = attention_weights(torch.tensor([0.1, 0.3]), torch.tensor([True, True]))
    >>> [round(weight, 4) for weight in weights.tolist()], round(mass.item(), 4), fell_back.item()
    ([0.25, 0.75], 0.4, False)

    Source: Chan et al., "Dense Reward for Free in RLHF", ICML 2024, section 4.1; the floor is ours.
    """
    if attention.shape != response_mask.shape:
        raise ValueError(
            f"attention {tuple(attention.shape)} and response_mask {tuple(response_mask.shape)} differ: "
            "the row must hold one weight a response slot"
        )
    row = torch.where(response_mask, attention.double(), 0.0)  # where, not *: 0 * NaN is NaN
    mass = row.sum(-1)
    fell_back = mass < floor
    normalised = row / mass.clamp(min=floor).unsqueeze(-1)
    return torch.where(fell_back.unsqueeze(-1), uniform_weights(response_mask), normalised), mass, fell_back


def blend(weights: torch.Tensor, response_mask: torch.Tensor, credit_beta: float) -> torch.Tensor:
    """``credit_beta * weights[t] + (1 - credit_beta) * 1[t = last]``: 0 is sparse, 1 is dense only.

    >>> blend(torch.tensor([0.5, 0.5]), torch.tensor([True, True]), credit_beta=0.8).tolist()
    [0.4, 0.6]
    """
    return credit_beta * weights.double() + (1 - credit_beta) * sparse_weights(response_mask)


class CreditMethod(Protocol):
    """Turns finished episodes into token rewards; what a wrapper binds."""

    name: ClassVar[str]
    conserves_return: ClassVar[bool]  # sum_t token_rewards[t] == score
    needs: ClassVar[frozenset[str]]  # what the reward model must provide, such as "attention"

    def __call__(self, outcome: Outcome) -> Credit:
        """Token rewards (N, H) float32 for the N episodes of ``outcome``."""
        ...


@dataclass(frozen=True)
class SparseCredit:
    """``token_rewards[t] = score * 1[t = last]``: plain RLHF."""

    name: ClassVar[str] = "sparse"
    conserves_return: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, outcome: Outcome) -> Credit:
        """Token rewards (N, H), all of it on the last response token."""
        return Credit(redistribute(outcome.reward.score, sparse_weights(outcome.episode.response_mask)), {})


@dataclass(frozen=True)
class UniformCredit:
    """``token_rewards[t] = score / T``."""

    name: ClassVar[str] = "uniform"
    conserves_return: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, outcome: Outcome) -> Credit:
        """Token rewards (N, H), the same on every response token."""
        return Credit(redistribute(outcome.reward.score, uniform_weights(outcome.episode.response_mask)), {})


@dataclass(frozen=True)
class AttentionCredit:
    """``token_rewards[t] = score * (credit_beta * alpha[t] + (1 - credit_beta) * 1[t = last])`` (ABC).

    Reports ``attention_mass`` (the share of the row on the response, before renormalising) and ``credit_fallback``
    (True where the mass was below ``attention_floor`` and alpha is uniform).
    """

    credit_beta: float = 0.8
    attention_floor: float = ATTENTION_FLOOR
    name: ClassVar[str] = "attention"
    conserves_return: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    def __post_init__(self) -> None:
        if not 0.0 <= self.credit_beta <= 1.0:
            raise ValueError(f"credit_beta is {self.credit_beta}; it mixes two weightings and must lie in [0, 1]")
        if not self.attention_floor > 0.0:
            raise ValueError(f"attention_floor is {self.attention_floor}; it must be positive (default 1e-3)")

    def __call__(self, outcome: Outcome) -> Credit:
        """Token rewards (N, H) that follow the attention row, and the report."""
        attention, mask = outcome.reward.attention, outcome.episode.response_mask
        if attention is None:
            raise ValueError("the reward model returned no attention row; use one that provides it, or UniformReward")
        alpha, mass, fell_back = attention_weights(attention, mask, self.attention_floor)
        weights = blend(alpha, mask, self.credit_beta)
        report = {"attention_mass": mass.float(), "credit_fallback": fell_back}
        return Credit(redistribute(outcome.reward.score, weights), report)


CREDIT_METHODS: dict[str, type] = {method.name: method for method in (SparseCredit, UniformCredit, AttentionCredit)}


def make_credit(name: str, credit_beta: float = 0.8) -> CreditMethod:
    """The credit method called ``name``; ``credit_beta`` matters to those that have one.

    >>> make_credit("uniform"), make_credit("attention", credit_beta=0.5).credit_beta
    (UniformCredit(), 0.5)

    Raises:
        ValueError: no method has this name.
    """
    if name not in CREDIT_METHODS:
        raise ValueError(f"credit is {name!r}; choose one of {', '.join(CREDIT_METHODS)}")
    return AttentionCredit(credit_beta) if name == AttentionCredit.name else CREDIT_METHODS[name]()
