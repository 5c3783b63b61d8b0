"""The losses of PPO, means over the True entries of a mask, (..., T) -> (); and of DPO, a mean over pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

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


def dpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    dpo_beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """``mean(-(1 - e) * log sigma(dpo_beta * h) - e * log sigma(-dpo_beta * h))`` with ``e = label_smoothing``.

    ``h = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)``: the reward that the policy implies,
    ``dpo_beta * (log policy - log reference)``, of the chosen response less that of the rejected one.

    Source: Rafailov et al., "Direct Preference Optimization", 2023, equation 7; the smoothing, for labels that are
    wrong with probability e, is Mitchell's "A note on DPO with noisy preferences", 2023.

    Args:
        policy_chosen: (...,) sequence log-probabilities in nats of the preferred responses; the policy learns.
        policy_rejected: (...,) of the other responses to the same prompts.
        ref_chosen: (...,) under the frozen reference.
        ref_rejected: (...,) under the frozen reference.
        dpo_beta: how closely the policy stays with the reference.
        label_smoothing: 0 trusts the labels; below 0.5.

    >>> same = torch.tensor([-7.0])
    >>> round(dpo_loss(same, same - 1, same, same - 1).item(), 4)                            # log 2 where they agree
    0.6931
    """
    h = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
    right, wrong = logsigmoid(dpo_beta * h), logsigmoid(-dpo_beta * h)
    return -((1 - label_smoothing) * right + label_smoothing * wrong).mean()
