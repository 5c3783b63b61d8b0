"""Advantages and returns of finished episodes. Trailing axis T is the response; everything outside the mask is 0."""

from __future__ import annotations

import torch


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation over terminated episodes of different length.

    ``delta[t] = rewards[t] + gamma * values[t+1] - values[t]`` with ``values[T] = 0`` after the last response token;
    ``advantages[t] = delta[t] + gamma * gae_lambda * advantages[t+1]``; ``returns = advantages + values``.

    Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", ICLR 2016,
    equation 16.

    Args:
        rewards: (..., T) float.
        values: (..., T) float; ``values[t]`` is the state before token t.
        mask: (..., T) bool, True on the response; True entries come first.
        gamma: Discount.
        gae_lambda: 0 gives the TD error, 1 gives ``returns - values``.

    Returns:
        advantages, returns: (..., T), zero outside the mask. What the padding holds (NaN included) cannot matter.

    >>> mask = torch.tensor([True, True, False])
    >>> advantages, returns = gae(torch.tensor([0.0, 2.0, 9.0]), torch.tensor([1.0, 1.0, 9.0]), mask, gae_lambda=1.0)
    >>> advantages.tolist(), returns.tolist()
    ([1.0, 1.0, 0.0], [2.0, 2.0, 0.0])
    """
    _check_shapes(rewards, values, mask)
    rewards = torch.where(mask, rewards, 0.0)  # where, not *: 0 * NaN is NaN
    values = torch.where(mask, values, 0.0)  # so the value after the last token is 0, as after any terminal state
    advantage = next_value = torch.zeros_like(values[..., 0])
    columns = []
    for t in reversed(range(values.shape[-1])):
        delta = rewards[..., t] + gamma * next_value - values[..., t]
        advantage = delta + gamma * gae_lambda * advantage  # zero while t is padding: every term is
        next_value = values[..., t]
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=-1)
    return advantages, advantages + values


def full_return(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole episode's reward for every token: ``returns[t] = sum_k rewards[k]``, ``advantages = returns - values``.

    Only the sum enters, so how a credit method that conserves it spreads a score makes no difference, and the policy
    gradient is unbiased for all of them; rewards that a token cannot have caused add noise.

    Source: Williams, "Simple statistical gradient-following algorithms", 1992 (REINFORCE with a baseline).

    Args:
        rewards: (..., T) float.
        values: (..., T) float; the baseline, which may depend on the state before token t.
        mask: (..., T) bool, True on the response.

    Returns:
        advantages, returns: (..., T), zero outside the mask. What the padding holds (NaN included) cannot matter.

    >>> mask = torch.tensor([True, True, False])
    >>> advantages, returns = full_return(torch.tensor([0.5, 2.0, 9.0]), torch.tensor([1.0, 1.5, 9.0]), mask)
    >>> advantages.tolist(), returns.tolist()
    ([1.5, 1.0, 0.0], [2.5, 2.5, 0.0])
    """
    _check_shapes(rewards, values, mask)
    total = torch.where(mask, rewards, 0.0).sum(-1, keepdim=True)
    returns = torch.where(mask, total, 0.0)
    return torch.where(mask, returns - values, 0.0), returns


def vine_advantages(scores: torch.Tensor, prefix_values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """VinePPO: ``advantages[t] = r[t] + V(s[t+1]) - V(s[t])`` with ``r[t] = score * 1[t = last]``.

    V is the expected score of a prefix, from Monte-Carlo continuations
    (`tokenmdp.rollouts.continuations.monte_carlo_values`); after the last token it is 0, so
    ``sum_t advantages[t] = score - V(s[0])``. This is `gae` with gamma 1 and lambda 0.

    Source: Kazemnejad et al., "VinePPO: Refining Credit Assignment in RL Training of LLMs", 2024.

    Args:
        scores: (...,) float.
        prefix_values: (..., T) float; ``prefix_values[t]`` is the state before token t.
        mask: (..., T) bool, True on the response; True entries come first.

    Returns:
        (..., T), zero outside the mask.

    >>> vine_advantages(torch.tensor(3.0), torch.tensor([1.0, 2.5, 9.0]), torch.tensor([True, True, False])).tolist()
    [1.5, 0.5, 0.0]
    """
    last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
    rewards = torch.where(last, scores.unsqueeze(-1), 0.0)  # (...,), (..., T) -> (..., T)
    return gae(rewards, prefix_values, mask, gamma=1.0, gae_lambda=0.0)[0]


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the True entries of ``mask``; 0 if there are none.

    >>> masked_mean(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False])).item()
    2.0
    """
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def masked_variance(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Population variance over the True entries of ``mask``.

    >>> masked_variance(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False])).item()
    1.0
    """
    return masked_mean((values - masked_mean(values, mask)).square(), mask)


def whiten(values: torch.Tensor, mask: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """``(values - mean) / (std + eps)`` over the mask: zero mean, standard deviation one; 0 outside the mask.

    Whitening token_rewards would break sum == score, so only advantages are whitened.

    >>> whiten(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False])).tolist()
    [-1.0, 1.0, 0.0]
    """
    std = masked_variance(values, mask).sqrt()
    return torch.where(mask, (values - masked_mean(values, mask)) / (std + eps), 0.0)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``1 - Var(returns - values) / Var(returns)`` over the mask; 0 where the returns do not vary.

    >>> explained_variance(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor([True, True])).item()
    1.0
    """
    variance = masked_variance(returns, mask)
    unexplained = masked_variance(returns - values, mask) / variance.clamp(min=1e-12)
    return torch.where(variance > 1e-12, 1 - unexplained, 0.0)


def _check_shapes(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> None:
    if not rewards.shape == values.shape == mask.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)}, values {tuple(values.shape)} and mask {tuple(mask.shape)} differ: "
            "each holds one entry a response token"
        )
