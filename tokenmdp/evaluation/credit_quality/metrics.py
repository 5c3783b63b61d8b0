"""How well credit agrees with a reference, one number per text. Trailing axes: credit, reference and mask are (..., T).

Everything is float64. NaN marks a text on which a number is not defined; means leave it out.
"""

from __future__ import annotations

import torch


def ranks(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Ranks 1 .. T among the masked values, ties sharing their mean rank; 0 outside the mask. (..., T) -> (..., T).

    >>> ranks(torch.tensor([3.0, 1.0, 3.0, 9.0]), torch.tensor([True, True, True, False])).tolist()
    [2.5, 1.0, 2.5, 0.0]
    """
    ours, others, counted = values.double()[..., :, None], values.double()[..., None, :], mask[..., None, :]
    below = ((others < ours) & counted).sum(-1)
    equal = ((others == ours) & counted).sum(-1)
    return torch.where(mask, below + (equal + 1) / 2, 0.0).double()


def rank_correlation(credit: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Spearman's correlation over the tokens of each text; (...,) in [-1, 1].

    Credit that is the same on every token says nothing about their order and counts as 0. A reference that is the same
    on every token has no order to find: NaN.

    >>> mask = torch.tensor([True, True, True])
    >>> rank_correlation(torch.tensor([5.0, 1.0, 2.0]), torch.tensor([0.3, 0.1, 0.2]), mask).item()
    1.0
    """
    length = mask.sum(-1, keepdim=True).clamp(min=1)
    centred = [
        torch.where(mask, rank - rank.sum(-1, keepdim=True) / length, 0.0)
        for rank in (ranks(credit, mask), ranks(reference, mask))
    ]
    ours, theirs = (rank.square().sum(-1) for rank in centred)
    correlation = (centred[0] * centred[1]).sum(-1) / (ours * theirs).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(theirs > 0, correlation.clamp(-1.0, 1.0), torch.nan)


def important_tokens(reference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The top quarter of each text: ``|reference[t]|`` among the ceil(T / 4) largest and not 0; (..., T) bool.

    Tokens that tie with the last of them are included.

    >>> reference, mask = torch.tensor([0.0, -4.0, 1.0, 0.5, 2.0]), torch.tensor([True] * 5)
    >>> important_tokens(reference, mask).tolist()
    [False, True, False, False, True]
    """
    size = torch.where(mask, reference.double().abs(), -1.0)
    last = ((mask.sum(-1, keepdim=True) + 3) // 4 - 1).clamp(min=0)
    threshold = size.sort(-1, descending=True).values.gather(-1, last)
    return mask & (size >= threshold) & (size > 0)


def area_under_roc(credit: torch.Tensor, important: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How well ``|credit|`` finds the important tokens: the chance that one of them has more than one of the others.

    ``auc = (sum of the important tokens' ranks - P (P + 1) / 2) / (P Q)`` with P important and Q other tokens, ranks of
    ``|credit|``; a tie counts half, so uniform credit has .5. NaN where P or Q is 0.

    Source: Hanley and McNeil, "The meaning and use of the area under a ROC curve", Radiology 1982.

    >>> mask = torch.tensor([True, True, True])
    >>> area_under_roc(torch.tensor([-3.0, 1.0, 2.0]), torch.tensor([True, False, False]), mask).item()
    1.0
    """
    positives = (important & mask).sum(-1).double()
    negatives = mask.sum(-1) - positives
    rank_sum = torch.where(important & mask, ranks(credit.abs(), mask), 0.0).sum(-1)
    pairs = positives * negatives
    return torch.where(pairs > 0, (rank_sum - positives * (positives + 1) / 2) / pairs.clamp(min=1), torch.nan)


def credit_order(
    credit: torch.Tensor, score: torch.Tensor, mask: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """The place of each token when sorted by credit toward the score's sign, 0 first; T outside the mask.

    ``place[t] = rank of sign(score) * credit[t]``, largest first. Equal credit is ordered at random, because any fixed
    order would favour one end of the text. (..., T), (...,) -> (..., T) int64.

    >>> mask = torch.tensor([[True, True, True, False]])
    >>> credit_order(torch.tensor([[1.0, 2.0, -3.0, 9.0]]), torch.tensor([-1.0]), mask, torch.Generator()).tolist()
    [[1, 2, 0, 4]]
    """
    sign = torch.where(score < 0, -1.0, 1.0).double()
    toward = torch.where(mask, sign[..., None] * credit.double(), -torch.inf)
    shuffled = torch.rand(toward.shape, generator=generator).argsort(-1)
    order = shuffled.gather(-1, toward.gather(-1, shuffled).argsort(dim=-1, descending=True, stable=True))
    place = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1]).expand(order.shape))
    return torch.where(mask, place, mask.shape[-1])


def area_over_line(curve: torch.Tensor, fractions: torch.Tensor) -> torch.Tensor:
    """``integral over u in [0, 1] of curve(u) - line(u)``, the line joining the curve's ends; (..., K) -> (...,).

    Trapezoids. Tokens taken in random order follow the line on average where each adds its own part of the score.

    >>> area_over_line(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, 0.5, 1.0])).item()
    0.25
    """
    curve, fractions = curve.double(), fractions.double()
    line = curve[..., :1] + (curve[..., -1:] - curve[..., :1]) * fractions
    return torch.trapezoid(curve - line, fractions, dim=-1)
