"""Which pairs to ask about: at random, or where the members of an ensemble disagree.

Source: Christiano et al., "Deep Reinforcement Learning from Human Preferences", 2017, section 2.2.4.
"""

from __future__ import annotations

from typing import Literal

import torch

Rule = Literal["random", "disagreement", "label-variance"]


def query_values(scores: torch.Tensor, rule: Rule) -> torch.Tensor:
    """How much is to be learned from asking about each pair: the greater, the sooner it is asked about.

    random            0: pairs are asked about as they come
    disagreement      variance over members of the predicted preference sigma(r_1 - r_2), with K - 1 in the denominator
    label-variance    q (1 - q), q the share of members that prefer the first response

    The variance of the differences themselves would pick pairs on which all agree strongly.

    Args:
        scores: (K, n, 2) of K members.
        rule: One of the above.

    Returns:
        (n,).

    >>> opposite = torch.tensor([[[20.0, 0.0], [1.0, 0.0]], [[40.0, 0.0], [0.0, 1.0]]])      # two members, two pairs
    >>> [round(value, 3) for value in query_values(opposite, "disagreement").tolist()]
    [0.0, 0.107]
    >>> query_values(opposite, "label-variance").tolist()
    [0.0, 0.25]
    """
    gaps = scores[..., 0] - scores[..., 1]  # (K, n)
    if rule == "random":
        return torch.zeros(gaps.shape[1])
    if len(gaps) < 2:
        raise ValueError(f"{rule} compares members, and there is {len(gaps)}; train some with --members")
    if rule == "disagreement":
        return gaps.sigmoid().var(0)
    votes = ((gaps > 0).float() + (gaps == 0).float() / 2).mean(0)
    return votes * (1 - votes)
