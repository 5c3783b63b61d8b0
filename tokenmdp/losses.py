"""The losses of PPO and SFT: means over the True entries of a mask, (..., T) -> ()."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tokenmdp.divergences import kl_k3
from tokenmdp.returns import masked_mean


class PolicyLoss(NamedTuple):
    """A policy loss with its two diagnostics (without gradient)."""

    loss: torch.Tensor  # ()
    approx_kl: torch.Tensor  # () k3 of the old policy against the new one, nats per token
    clip_fraction: torch.Tensor  # () share of tokens with |ratio - 1| > clip_coef


def clipped_policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_coef: float = 0.2,
) -> PolicyLoss:
    """``mean(max(-A * ratio, -A * clip(ratio, 1 - clip_coef, 1 + clip_coef)))``, ``ratio = exp(logprobs - old)``.

    Source: Schulman et al., "Proximal Policy Optimization Algorithms", 2017, equation 7 (negated: a loss).

    Args:
        logprobs: (..., T) of the policy that learns.
        old_logprobs: (..., T) of the policy that sampled.
        advantages: (..., T).
        mask: (..., T) bool.
        clip_coef: Half-width of the trust interval around ratio 1.

    >>> rise = clipped_policy_loss(torch.tensor([0.0]), torch.tensor([-1.0]), torch.tensor([2.0]), torch.tensor([True]))
    >>> round(rise.loss.item(), 4), rise.clip_fraction.item()      # the ratio e is cut at 1.2
    (-2.4, 1.0)
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)  # before exp: padding must not overflow
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    loss = masked_mean(torch.maximum(-advantages * ratio, -advantages * clipped), mask)
    with torch.no_grad():
        approx_kl = masked_mean(kl_k3(torch.zeros_like(log_ratio), log_ratio), mask)
        clip_fraction = masked_mean(((ratio - 1).abs() > clip_coef).float(), mask)
    return PolicyLoss(loss, approx_kl, clip_fraction)


def clipped_value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    clip_coef_value: float | None = 0.2,
) -> torch.Tensor:
    """``mean(max((V - R)**2, (clip(V, old - c, old + c) - R)**2)) / 2`` with ``c = clip_coef_value``.

    ``None`` switches the clipping off: ``mean((V - R)**2) / 2``.

    >>> far = torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([True])
    >>> round(clipped_value_loss(*far).item(), 4), clipped_value_loss(*far, clip_coef_value=None).item()
    (0.32, 0.0)
    """
    error = (values - returns).square()
    if clip_coef_value is not None:
        clipped = old_values + (values - old_values).clamp(-clip_coef_value, clip_coef_value)
        error = torch.maximum(error, (clipped - returns).square())
    return masked_mean(error, mask) / 2


def entropy_bonus(entropy: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``mean(entropy)`` in nats per token; a loss subtracts ``ent_coef`` times it.

    >>> entropy_bonus(torch.tensor([0.5, 9.0]), torch.tensor([True, False])).item()
    0.5
    """
    return masked_mean(entropy, mask)


def sft_loss(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``-mean(logprobs)`` over response tokens, nats per token: every token of the batch counts the same.

    Args:
        logprobs: (..., T) of the tokens of the data.
        mask: (..., T) bool, True on the response, its end-of-text token included.

    >>> sft_loss(torch.tensor([-0.5, -1.5, -9.0]), torch.tensor([True, True, False])).item()
    1.0
    """
    return -masked_mean(logprobs, mask)
