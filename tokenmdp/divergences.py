"""How far two policies are apart: estimators of the KL to a reference, and f-divergences to a target distribution.

KL to a reference: ``lr = logprobs - ref_logprobs`` for tokens sampled from the policy. `kl_k1`, `kl_k2` and `kl_k3` act
element-wise, so they take tokens (..., T) or whole sequences (N,). Source: Schulman, "Approximating KL Divergence",
2020, whose ratio r is ``exp(-lr)`` here.

f-divergences: ``t = pi / p`` of whole responses, for a policy pi and a target p, and ``D_f(pi || p) = E_p[f(t)]``
with a convex f, ``f(1) = 0``. Its gradient needs samples of the policy alone,

    grad D_f(pi || p) = E_pi[f'(t) grad log pi],

so it is REINFORCE with the reward ``-f'(t)``, the `pseudo_reward`. All functions take ``log_t`` of any shape, float64
for whole responses, and act element-wise; ``log_t = inf`` where p is 0. Source: Go et al., "Aligning Language Models
with Preferences through f-divergence Minimization", ICML 2023, whose Jensen-Shannon divergence is twice the usual one,
as ``js`` is here.

| name | divergence | f(t) | -f'(t) | -f'(inf) |
|---|---|---|---|---|
| forward-kl | KL(p, pi) | -log t | 1 / t | 0 |
| reverse-kl | KL(pi, p) | t log t | -(log t + 1) | -inf |
| tv | total variation | abs(t - 1) / 2 | -sign(t - 1) / 2 | -1 / 2 |
| js | 2 JS(pi, p) | t log(2 t / (t + 1)) + log(2 / (t + 1)) | log(1 + 1 / t) - log 2 | -log 2 |

Units: nats, but for total variation, which lies in [0, 1].
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch.nn.functional import softplus

Divergence = Literal["forward-kl", "reverse-kl", "js", "tv"]


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


def pseudo_reward(divergence: Divergence, log_t: torch.Tensor) -> torch.Tensor:
    """``-f'(t)``: what a response earns where REINFORCE is to minimise ``D_f(pi || p)``.

    Args:
        divergence: Name of f.
        log_t: ``log pi - log p`` of each response; inf where p is 0, and there the result is ``-f'(inf)``: finite
            unless the divergence is the reverse KL.

    Raises:
        ValueError: an unknown name.

    >>> zero, one = torch.tensor([torch.inf]), torch.tensor([0.0])          # p = 0, and p = pi
    >>> [round(pseudo_reward(name, zero).item(), 3) for name in ("forward-kl", "reverse-kl", "js", "tv")]
    [0.0, -inf, -0.693, -0.5]
    >>> [round(pseudo_reward(name, one).item(), 3) + 0 for name in ("forward-kl", "reverse-kl", "js", "tv")]
    [1.0, -1.0, 0.0, 0.0]
    """
    match divergence:
        case "forward-kl":
            return (-log_t).exp()
        case "reverse-kl":
            return -(log_t + 1)
        case "tv":
            return -log_t.sign() / 2
        case "js":
            return softplus(-log_t) - math.log(2)
    raise ValueError(f"there is no divergence {divergence!r}; choose one of {', '.join(get_args(Divergence))}")


def f_value(divergence: Divergence, log_t: torch.Tensor) -> torch.Tensor:
    """``f(t)``, whose mean under the target p is ``D_f(pi || p)``.

    Raises:
        ValueError: an unknown name.

    >>> f_value("tv", torch.tensor([2.0, 0.5], dtype=torch.float64).log()).tolist()
    [0.5, 0.25]
    >>> round(f_value("js", torch.tensor(0.0)).item(), 6)
    0.0
    """
    if divergence == "forward-kl":
        return -log_t
    if divergence == "tv":
        return torch.expm1(log_t).abs() / 2
    return log_t.exp() * f_over_t(divergence, log_t)


def f_over_t(divergence: Divergence, log_t: torch.Tensor) -> torch.Tensor:
    """``f(t) / t``, whose mean under the policy is ``D_f(pi || p)`` where pi is 0 nowhere: for samples of the policy.

    Where p is 0 it is ``f'(inf)``: 0, inf, 1/2 and log 2 for forward KL, reverse KL, total variation and ``js``. So
    responses that the target excludes count for what they add to the divergence.

    Raises:
        ValueError: an unknown name.

    >>> [round(f_over_t(name, torch.tensor(torch.inf)).item(), 4) for name in ("forward-kl", "reverse-kl", "js", "tv")]
    [0.0, inf, 0.6931, 0.5]
    """
    inverse = (-log_t).exp()  # 1 / t = p / pi
    match divergence:
        case "forward-kl":
            return torch.where(inverse > 0, -log_t * inverse, 0.0)
        case "reverse-kl":
            return log_t
        case "tv":
            return (1 - inverse).abs() / 2
        case "js":  # log(2t / (t+1)) + log(2 / (t+1)) / t
            rest = torch.where(inverse > 0, inverse * (math.log(2) - softplus(log_t)), 0.0)
            return math.log(2) - softplus(-log_t) + rest
    raise ValueError(f"there is no divergence {divergence!r}; choose one of {', '.join(get_args(Divergence))}")
