"""How far a policy has moved from its reference: the three KL estimators, from samples of the policy.

``lr = logprobs - ref_logprobs`` for tokens sampled from the policy. All three act element-wise, so they take tokens
(..., T) or whole sequences (N,). Units: nats. Source: Schulman, "Approximating KL Divergence", 2020, whose ratio r
is ``exp(-lr)`` here.
"""

from __future__ import annotations

import torch


def kl_k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """``k1 = lr``: unbiased, either sign; what a per-token KL penalty subtracts from the reward.

    >>> kl_k1(torch.tensor([-1.0]), torch.tensor([-1.5])).tolist()
    [0.5]
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """``k2 = lr ** 2 / 2``: never negative, low variance, biased.

    >>> kl_k2(torch.tensor([-1.0]), torch.tensor([-1.5])).tolist()
    [0.125]
    """
    return (logprobs - ref_logprobs).square() / 2


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """``k3 = exp(-lr) - 1 + lr``: never negative and unbiased.

    >>> round(kl_k3(torch.tensor(-1.0), torch.tensor(-1.5)).item(), 4)
    0.1065
    """
    log_ratio = logprobs - ref_logprobs
    return torch.expm1(-log_ratio) + log_ratio
