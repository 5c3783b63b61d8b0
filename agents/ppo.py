"""PPO for language models, with the reward of each token where the credit wrapper put it.

One update: every row of the vector environment plays one episode; the KL to a frozen reference is taken off the token
rewards; GAE turns them into advantages; several epochs of minibatches take clipped steps. Reads top to bottom;
README.md beside this file numbers the details and defines every metric.

    import gymnasium as gym
    from tokenmdp.agents.ppo import PPO, PPOConfig
    from tokenmdp.wrappers import vector

    envs = gym.make_vec("tokenmdp:TextGen-IMDb-v0", num_envs=64, autoreset_mode="Disabled")
    agent = PPO("imdb-tiny", vector.AttentionCreditReward(envs, credit_beta=0.8), PPOConfig(seed=1))
    agent.learn(num_updates=150)
    agent.save("runs/first")

Sources: Schulman et al., "Proximal Policy Optimization Algorithms", 2017; Ziegler et al., "Fine-Tuning Language Models
from Human Preferences", 2019 (KL penalty in the reward, adaptive coefficient); Huang et al., "The N Implementation
Details of RLHF with PPO", 2023; Chan et al., "Dense Reward for Free in RLHF", ICML 2024 (token rewards).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from tokenmdp.agents.base import Agent, AgentConfig, Metrics
from tokenmdp.divergences import kl_k1
from tokenmdp.losses import clipped_policy_loss, clipped_value_loss, entropy_bonus
from tokenmdp.models.token_distribution import TokenScores
from tokenmdp.returns import explained_variance, full_return, gae, vine_advantages, whiten
from tokenmdp.rollouts.continuations import monte_carlo_values
from tokenmdp.training.checkpoint import Format
from tokenmdp.training.typed import require
from tokenmdp.types import Rollout
from tokenmdp.wrappers import find_credit_wrapper


@dataclass(frozen=True)
class PPOConfig(AgentConfig):
    """The numbers of one run; details are those of README.md beside this file.

    Defaults fit the bundled 4.5M-parameter policy with 64 episodes of 16 tokens.
    """

    vf_learning_rate: float = 3e-3  # of the value head, which starts at zero; see 17 in agents/README.md
    value_model: Literal["shared", "separate"] = "shared"  # separate: a transformer of its own; see 14 there
    value_model_learning_rate: float = 1e-4  # only for separate: of that transformer
    estimator: Literal["reward_to_go", "full_return", "vine"] = "reward_to_go"  # of advantages; see 10 to 12 there
    vine_rollouts: int = 4  # only for vine: continuations of each prefix
    gamma: float = 1.0  # discount; below 1 credit that arrives early counts more, whatever the method
    gae_lambda: float = 0.95  # of GAE: 0 trusts the critic, 1 the returns
    clip_coef_value: float | None = 1.0  # of the values, in units of the score; None: no clipping
    vf_coef: float = 0.1  # weight of the value loss
    ent_coef: float = 0.0  # weight of the entropy bonus

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "vf_learning_rate value_model_learning_rate vine_rollouts clip_coef_value", "positive")
        require(self, "vf_coef ent_coef", "not negative")
        require(self, "gamma gae_lambda", "in [0, 1]")
        if self.estimator != "reward_to_go" and self.gamma != 1:
            raise ValueError(f"gamma is {self.gamma}; estimator={self.estimator!r} does not discount: set gamma=1")
        if self.value_model == "separate" and self.lora_rank:
            raise ValueError(
                f"lora_rank is {self.lora_rank}, which saves memory, and value_model='separate' trains all weights of "
                "a second transformer; leave out one of them (in the command, --lora-rank or --value-model)"
            )


class PPO(Agent):
    """Proximal policy optimization with a value head, or a value model; arguments and attributes as `Agent`'s."""

    config_class = PPOConfig
    format = Format("ppo", 2)  # 2: the value head has a learning rate of its own
    config: PPOConfig

    def check(self) -> None:
        """Refuse credit that the estimator cannot use."""
        credit = find_credit_wrapper(self.envs)
        if self.config.estimator == "vine" and credit is not None and not credit.credit.conserves_return:
            raise ValueError(
                f"estimator='vine' values prefixes by the score alone and {credit.credit.name} credit adds other "
                "rewards; choose a credit method that conserves the return, or another estimator"
            )

    @property
    def norms(self) -> tuple[str, ...]:  # noqa: D102
        separate = self.config.value_model == "separate"
        return ("grad_norm", "vf_grad_norm", *(["value_model_grad_norm"] if separate else []))

    def prepare(self, model: nn.Module, reference: nn.Module | None = None) -> None:  # noqa: D102
        if self.config.value_model == "separate":
            self.policy.separate_values()
        super().prepare(model, reference)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The language model (or its adapters), then the value head and the value model's transformer."""
        cfg = self.config
        return self.policy.parameter_groups(cfg.learning_rate, cfg.vf_learning_rate, cfg.value_model_learning_rate)

    def update(self) -> Metrics:
        """One update; README.md beside this file defines the metrics."""
        # 1 Sample: one episode per row, scored by the reward model, credited by the wrapper.
        rollout, metrics = self.play()
        mask = rollout.response_mask

        # 2 Rewards: credit and, apart from it, the KL penalty, token by token.  (N, H)
        penalties = -self.kl_coef * kl_k1(rollout.logprobs, rollout.ref_logprobs)

        # 3 Advantages. Whitening rewards would break sum == score, so only advantages are whitened.
        advantages, returns = self._advantages(rollout, penalties)
        metrics["explained_variance"] = explained_variance(rollout.values, returns, mask).item()
        advantages = whiten(advantages, mask)

        # 4 Epochs of minibatches.
        cfg = self.config

        def losses(new: TokenScores, old: Rollout, rows: torch.Tensor) -> dict[str, torch.Tensor]:
            mask = old.response_mask
            adv, targets = advantages[rows, : mask.shape[1]], returns[rows, : mask.shape[1]]
            policy = clipped_policy_loss(new.logprobs, old.logprobs, adv, mask, cfg.clip_coef)
            value_loss = clipped_value_loss(new.values, old.values, targets, mask, cfg.clip_coef_value)
            entropy = entropy_bonus(new.entropy, mask)
            loss = policy.loss + cfg.vf_coef * value_loss
            if cfg.ent_coef:  # a zero would still cost a pass over the vocabulary in the backward
                loss = loss - cfg.ent_coef * entropy
            return {
                "approx_kl": policy.approx_kl, "loss": loss, "policy_loss": policy.loss, "value_loss": value_loss,
                "entropy": entropy, "clip_fraction": policy.clip_fraction,
            }  # fmt: skip

        return metrics | self.take_steps(rollout, losses)

    def _advantages(self, rollout: Rollout, penalties: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantages and the value function's targets by ``config.estimator``, (N, H) each."""
        cfg, values, mask = self.config, rollout.values, rollout.response_mask
        if cfg.estimator == "full_return":
            return full_return(rollout.token_rewards + penalties, values, mask)
        if cfg.estimator == "reward_to_go":
            return gae(rollout.token_rewards + penalties, values, mask, cfg.gamma, cfg.gae_lambda)
        prefix_values = monte_carlo_values(
            self.envs, self.policy, rollout, cfg.vine_rollouts, self.generator, self.processes
        )
        advantages, returns = gae(penalties, values, mask, cfg.gamma, cfg.gae_lambda)  # the critic sees no score
        return advantages + vine_advantages(rollout.scores, prefix_values, mask), returns

    def warning(self) -> str | None:
        """A warning after `CRITIC_DUE` updates if the critic explains next to nothing."""
        return critic_warning(self.history, self.config)


CRITIC_DUE = 20  # updates after which a critic explains some of the returns
CRITIC_LEAST = 0.1  # explained variance


def critic_warning(history: list[Metrics], config: PPOConfig) -> str | None:
    """A warning after update `CRITIC_DUE` if the critic explains less than `CRITIC_LEAST` of returns that vary.

    A method that gives rewards early needs a critic less, so with such a critic a comparison of credit methods
    measures the critic. With ``estimator="vine"`` the critic sees only the KL penalty, and no warning is given.

    >>> critic_warning(20 * [{"explained_variance": 0.6, "score_std": 1.0}], PPOConfig()) is None
    True
    """
    if len(history) != CRITIC_DUE or config.estimator == "vine":
        return None
    recent = history[CRITIC_DUE // 2 :]
    explained, spread = (
        sum(record[key] for record in recent) / len(recent) for key in ("explained_variance", "score_std")
    )
    if explained >= CRITIC_LEAST or spread < 1e-6:
        return None
    change = "lower" if explained < -CRITIC_LEAST else "raise"
    rates = f"vf_learning_rate (now {config.vf_learning_rate:g})"
    if config.value_model == "separate":
        rates += f" and value_model_learning_rate (now {config.value_model_learning_rate:g})"
    return (
        f"the critic explains {explained:.2f} of the variance of the returns in updates {CRITIC_DUE // 2 + 1} to "
        f"{CRITIC_DUE}, though scores vary: advantages are hardly better than returns; {change} {rates}, "
        "or play more episodes per update"
    )
