"""From one score at the end to one reward per token: the formulas that the credit methods share.

Weights are non-negative, zero outside the response and sum to one, so ``redistribute`` conserves the score. An
attribution has signs and its own sum; `conserve` turns it into token rewards that conserve the score. Every function
works on trailing axes: scores (...,), masks, weights and token rewards (..., T). Sums are taken in float64, and the
result has the score's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenmdp.credit.options import check_number

ATTENTION_FLOOR = 1e-3  # below this response mass, dividing by it amplifies noise
NEARLY_UNIFORM = 0.95  # share of the maximum entropy; rows of small classifiers not trained for it lie there


def redistribute(score: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``token_rewards[t] = score * weights[t]``, in the score's dtype.

    >>> redistribute(torch.tensor(2.0), torch.tensor([0.25, 0.75, 0.0])).tolist()
    [0.5, 1.5, 0.0]
    """
    return (score.double().unsqueeze(-1) * weights.double()).to(score.dtype)  # (...,), (..., T) -> (..., T)


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


def sharpened(weights: torch.Tensor, power: float) -> torch.Tensor:
    """``weights[t] ** power / sum_s weights[s] ** power``, float64.

    >>> sharpened(torch.tensor([0.2, 0.4, 0.4, 0.0], dtype=torch.float64), 2).tolist()
    [0.1111111111111111, 0.4444444444444444, 0.4444444444444444, 0.0]
    """
    powers = (weights.double() / weights.amax(-1, keepdim=True)) ** power  # of the highest: none underflows together
    return powers / powers.sum(-1, keepdim=True)


def shuffled_rows(
    weights: torch.Tensor, response_mask: torch.Tensor, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Each row's weights in random order within its response; (N, T), one generator per row.

    >>> weights, mask = torch.tensor([[0.5, 0.3, 0.2, 0.0]]), torch.tensor([[True, True, True, False]])
    >>> moved = shuffled_rows(weights, mask, [torch.Generator().manual_seed(0)])[0]
    >>> sorted(moved[:3].tolist()) == sorted(weights[0, :3].tolist()), moved[3].item()
    (True, 0.0)
    """
    moved = weights.clone()
    for row, mask, generator in zip(moved, response_mask.bool(), generators, strict=True):
        own = row[mask]
        row[mask] = own[torch.randperm(len(own), generator=generator)]
    return moved


def blend(weights: torch.Tensor, response_mask: torch.Tensor, credit_beta: float) -> torch.Tensor:
    """``credit_beta * weights[t] + (1 - credit_beta) * 1[t = last]``: 0 is sparse, 1 is dense only.

    >>> blend(torch.tensor([0.5, 0.5]), torch.tensor([True, True]), credit_beta=0.8).tolist()
    [0.4, 0.6]
    """
    return credit_beta * weights.double() + (1 - credit_beta) * sparse_weights(response_mask)


def conserve(
    attribution: torch.Tensor, score: torch.Tensor, response_mask: torch.Tensor, credit_beta: float = 1.0
) -> torch.Tensor:
    """Token rewards that follow an attribution and sum to the score; what no token explains goes to the last one.

    ``token_rewards[t] = credit_beta * attribution[t] + 1[t = last] * (score - credit_beta * sum_t attribution[t])``

    The last token is where sparse credit puts everything, so ``credit_beta = 0`` is sparse. A reward there is part of
    the return after every token: where the remainder depends on the prompt alone, such as the score of an empty
    response, it acts as a baseline and moves no policy gradient.

    Args:
        attribution: (..., T) of any sign; what it holds outside the mask (NaN included) does not matter.
        score: (...,).
        response_mask: (..., T) bool with at least one True.
        credit_beta: 0 is sparse, 1 is dense only.

    Returns:
        (..., T) in the score's dtype.

    >>> mask = torch.tensor([True, True, False])
    >>> conserve(torch.tensor([3.0, -0.5, 9.0]), torch.tensor(2.0), mask).tolist()
    [3.0, -1.0, 0.0]
    """
    dense = credit_beta * torch.where(response_mask, attribution.double(), 0.0)  # where, not *: 0 * NaN is NaN
    remainder = score.double() - dense.sum(-1)
    return (dense + remainder.unsqueeze(-1) * sparse_weights(response_mask)).to(score.dtype)


def row_entropy(weights: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """``-sum_t weights[t] * log(weights[t]) / log(T)``: 1 for uniform weights, 0 for all on one token; (...,) float64.

    A single token has only one weighting, which counts as 0.

    >>> mask = torch.tensor([True, True, False])
    >>> row_entropy(torch.tensor([0.5, 0.5, 0.0]), mask).item(), row_entropy(torch.tensor([1.0, 0.0, 0.0]), mask).item()
    (1.0, 0.0)
    """
    weights = torch.where(response_mask, weights.double(), 0.0)
    entropy = torch.special.entr(weights).sum(-1)
    length = response_mask.sum(-1)
    return torch.where(length > 1, entropy / length.clamp(min=2).double().log(), 0.0)


def check_credit_beta(credit_beta: float) -> None:
    """Refuse a mixture outside [0, 1].

    Raises:
        ValueError: with the value.
    """
    check_number("credit_beta", credit_beta)
    if not 0.0 <= credit_beta <= 1.0:
        raise ValueError(f"credit_beta is {credit_beta}; it mixes two weightings and must lie in [0, 1]")
