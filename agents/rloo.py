"""RLOO: REINFORCE with the other responses to the same prompt as the baseline. No critic.

One update: K episodes per prompt; the KL to a frozen reference is taken off the token rewards; every token of an
episode gets the episode's whole reward less the mean reward of the K - 1 others; clipped steps. Reads top to bottom.

    import gymnasium as gym
    from tokenmdp.agents.rloo import RLOO, RLOOConfig
    from tokenmdp.wrappers import vector

    envs = gym.make_vec("tokenmdp:TextGen-IMDb-v0", num_envs=64, autoreset_mode="Disabled")
    agent = RLOO("imdb-tiny", vector.SparseReward(envs), RLOOConfig(responses_per_prompt=4, seed=1))
    agent.learn(num_updates=150)

The rewards of an episode are summed first, so a credit method that conserves the score makes no difference here.

Sources: Kool et al., "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019; Ahmadian et al., "Back to Basics:
Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs", ACL 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tokenmdp.agents.base import Agent, AgentConfig, Metrics
from tokenmdp.agents.learner import without_value_head
from tokenmdp.divergences import kl_k1
from tokenmdp.losses import clipped_policy_loss, entropy_bonus
from tokenmdp.models.token_distribution import TokenScores
from tokenmdp.training.checkpoint import Format
from tokenmdp.types import Rollout


@dataclass(frozen=True)
class RLOOConfig(AgentConfig):
    """The numbers of one run. Defaults fit the bundled 4.5M-parameter policy with 64 episodes of 16 tokens."""

    responses_per_prompt: int = 4  # K, at least 2; divides num_envs

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.responses_per_prompt < 2:
            raise ValueError(
                f"responses_per_prompt is {self.responses_per_prompt}; the baseline is the other responses' mean, so "
                "at least 2 are needed"
            )


class RLOO(Agent):
    """REINFORCE with a leave-one-out baseline; arguments and attributes as `Agent`'s."""

    config_class = RLOOConfig
    format = Format("rloo", 1)
    uses_credit = False
    config: RLOOConfig

    def check(self) -> None:
        """Refuse rows that are not whole groups; processes do not share a group."""
        self.check_groups(self.config.responses_per_prompt)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The language model or its adapters; the value head is not used and stays as it is."""
        return without_value_head(self.policy, self.config.learning_rate)

    def update(self) -> Metrics:
        """One update; README.md beside this file defines the metrics."""
        # 1 Sample: K episodes per prompt, in K rows that follow each other.
        rollout, metrics = self.play(self.config.responses_per_prompt)
        mask = rollout.response_mask

        # 2 Rewards: token rewards, and off them the KL penalty.  (N, H)
        penalties = -self.kl_coef * kl_k1(rollout.logprobs, rollout.ref_logprobs)
        rewards = torch.where(mask, rollout.token_rewards + penalties, 0.0)

        # 3 Advantages.  (N, H)
        advantages = self.advantages(rewards, mask)
        metrics["advantage_std"] = advantages[mask].std(correction=0).item()

        # 4 Epochs of minibatches. In the first step every ratio is 1, so it is REINFORCE's.
        def losses(new: TokenScores, old: Rollout, rows: torch.Tensor) -> dict[str, torch.Tensor]:
            kept = old.response_mask
            policy = clipped_policy_loss(
                new.logprobs, old.logprobs, advantages[rows, : kept.shape[1]], kept, self.config.clip_coef
            )
            return {
                "approx_kl": policy.approx_kl, "loss": policy.loss, "entropy": entropy_bonus(new.entropy, kept),
                "clip_fraction": policy.clip_fraction,
            }  # fmt: skip

        return metrics | self.take_steps(rollout, losses)

    def advantages(self, rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """One number per episode, for all its tokens: the sum of its rewards less that of the others; (N, H)."""
        return leave_one_out(rewards.sum(-1), self.config.responses_per_prompt).unsqueeze(-1) * mask


def leave_one_out(rewards: torch.Tensor, group: int) -> torch.Tensor:
    """``A_i = R_i - mean of R_j over the other members j of i's group`` = ``group / (group - 1) * (R_i - mean)``.

    The baseline does not depend on response i, so the policy gradient stays unbiased.

    Args:
        rewards: (N,), members of a group side by side.
        group: K, which divides N.

    Returns:
        (N,).

    >>> leave_one_out(torch.tensor([1.0, 3.0, 5.0, 5.0]), group=2).tolist()
    [-2.0, 2.0, 0.0, 0.0]
    """
    groups = rewards.view(-1, group)
    return (group / (group - 1) * (groups - groups.mean(-1, keepdim=True))).flatten()
