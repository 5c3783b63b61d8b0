"""GRPO: REINFORCE with the mean of a group of responses to one prompt as the baseline. No critic.

The update is RLOO's, in rloo.py, but for the advantages, which are below: what a token's return is, and whether it is
divided by the group's standard deviation.

    import gymnasium as gym
    from tokenmdp.agents.grpo import GRPO, GRPOConfig
    from tokenmdp.credit import make_credit
    from tokenmdp.wrappers import vector

    envs = gym.make_vec("tokenmdp:TextGen-IMDb-v0", num_envs=64, autoreset_mode="Disabled")
    agent = GRPO("imdb-tiny", vector.CreditReward(envs, make_credit("red")), GRPOConfig(estimator="reward_to_go"))
    agent.learn(num_updates=150)

With the estimator "sequence" the rewards of an episode are summed first, so a credit method that conserves the score
makes no difference. With "reward_to_go" a token gets the rewards from it on: there credit can matter without a critic.

Sources: Shao et al., "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", 2024, whose
"process supervision" sums rewards from a token on, too, and which takes the KL into the loss and not into the reward;
Liu et al., "Understanding R1-Zero-Like Training: A Critical Perspective", 2025, on the division.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tokenmdp.agents.rloo import RLOO, RLOOConfig
from tokenmdp.training.checkpoint import Format

LEAST_SD = 1e-4  # of a group: returns that are the same up to rounding have no advantages, not 0 / 0


@dataclass(frozen=True)
class GRPOConfig(RLOOConfig):
    """The numbers of one run. Defaults fit the bundled 4.5M-parameter policy with 64 episodes of 16 tokens."""

    responses_per_prompt: int = 8  # K, at least 2; divides num_envs
    estimator: Literal["sequence", "reward_to_go"] = "sequence"  # a token's return: the episode's, or from it on
    divide_by_sd: bool = True  # divides by the group's sd: groups that differ little count as much, which biases


class GRPO(RLOO):
    """Group-relative policy optimization; arguments and attributes as `Agent`'s."""

    config_class = GRPOConfig
    format = Format("grpo", 1)
    uses_credit = True  # with the estimator "reward_to_go"
    config: GRPOConfig

    def advantages(self, rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """By ``config.estimator``, (N, H)."""
        cfg = self.config
        if cfg.estimator == "sequence":
            every = torch.ones_like(mask[:, :1])  # the return of an episode, whether it has ended at t or not
            whole = rewards.sum(-1, keepdim=True)  # (N, 1)
            return group_advantages(whole, every, cfg.responses_per_prompt, cfg.divide_by_sd) * mask
        returns = rewards.flip(-1).cumsum(-1).flip(-1)  # G[t] = sum_{k >= t} rewards[k]
        return group_advantages(returns, mask, cfg.responses_per_prompt, cfg.divide_by_sd)


def group_advantages(returns: torch.Tensor, mask: torch.Tensor, group: int, divide_by_sd: bool = True) -> torch.Tensor:
    """``A_i[t] = (G_i[t] - mean_j G_j[t]) / sd_j G_j[t]`` over the members j of i's group that have a token t.

    Without the division this is ``(n - 1) / n`` times what the other n - 1 members' mean gives as a baseline: unbiased
    but for that factor, and 0 where n is 1. The sd is the population's.

    Args:
        returns: (N, H) G, members of a group side by side; H is 1 for whole episodes.
        mask: (N, H) bool, True on the response.
        group: K, which divides N.
        divide_by_sd: Divide, as GRPO does; the gradient is then that of another objective.

    Returns:
        (N, H), 0 outside the response.

    >>> returns, mask = torch.tensor([[4.0, 2.0], [0.0, 9.0]]), torch.tensor([[True, True], [True, False]])
    >>> group_advantages(returns, mask, group=2, divide_by_sd=False).tolist()
    [[2.0, 0.0], [-2.0, 0.0]]
    """
    groups, present = returns.view(-1, group, returns.shape[-1]), mask.view(-1, group, mask.shape[-1])
    count = present.sum(1, keepdim=True).clamp(min=1)  # (N / K, 1, H)
    centred = torch.where(present, groups - torch.where(present, groups, 0.0).sum(1, keepdim=True) / count, 0.0)
    if divide_by_sd:
        centred = centred / (centred.square().sum(1, keepdim=True) / count).sqrt().clamp(min=LEAST_SD)
    return centred.reshape(returns.shape)
