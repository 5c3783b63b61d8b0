"""One agent whose rollouts and updates are timed from outside, through what its users can call."""

from __future__ import annotations

import torch

from speed_parts.shapes import Shape, make_agent, make_envs, make_reward_model
from speed_parts.timing import Numbers, Stopwatch, TimedEnvs, TimedReward, now
from tokenmdp.agents.ppo import PPO
from tokenmdp.reward_models import RewardModel
from tokenmdp.reward_models.retokenized import RetokenizedRewardModel
from tokenmdp.rollouts import collect


class ClockedAgent:
    """An agent with watches on its environments, its reward model and its reference.

    Args:
        shape: what is measured.
        dtype: as in `PPOConfig`.
        device: where everything runs.
        credit: a name of `tokenmdp.credit.CREDIT_METHODS`.
        real_reward: score with a classifier of the policy's size instead of a free number.
        aligned: this classifier reads the decoded text, as if it had a tokenizer of its own.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: str,
        device: torch.device,
        credit: str = "sparse",
        real_reward: bool = False,
        aligned: bool = False,
    ) -> None:
        if aligned and not real_reward:
            raise ValueError("aligned is about a real reward model; pass real_reward=True, too")
        self.shape, self.device = shape, device
        self.envs_watch, self.reward_watch, self.reference_watch = (Stopwatch(device) for _ in range(3))
        reward_model: RewardModel | None = make_reward_model(shape, str(device)) if real_reward else None
        if reward_model is not None:
            aligned_model = RetokenizedRewardModel(reward_model, reward_model.tokenizer) if aligned else reward_model
            reward_model = TimedReward(aligned_model, self.reward_watch)
        envs = TimedEnvs(make_envs(shape, reward_model, credit), self.envs_watch)
        self.agent: PPO = make_agent(shape, envs, dtype, str(device))
        reference = self.agent.reference
        reference.evaluate = self.reference_watch.around(reference.evaluate)

    def rollout(self) -> Numbers:
        """`collect` once. ``seconds`` is without the reference forward, which is timed in the same call."""
        agent = self.agent
        self._reset()
        start = now(self.device)
        rollout, _ = collect(
            agent.envs, agent.policy, agent.reference, agent.generator, rows_per_forward=agent.rows_per_forward
        )
        whole = now(self.device) - start
        reference = self.reference_watch.take()
        return {
            "seconds": whole - reference,
            "reference_seconds": reference,
            "envs_seconds": self.envs_watch.take(),
            "reward_seconds": self.reward_watch.take(),
            "tokens": int(rollout.response_mask.sum()),
        }

    def iteration(self) -> Numbers:
        """`PPO.learn(1)`. The update phase is all that follows the last step and the last reference forward."""
        self._reset()
        start = now(self.device)
        self.agent.learn(1)
        end = now(self.device)
        rollout_end = max(self.envs_watch.stopped_at, self.reference_watch.stopped_at)
        return {
            "seconds": end - start,
            "update_seconds": end - rollout_end,
            "reference_seconds": self.reference_watch.take(),
            "tokens": int(self.agent.history[-1]["response_tokens"]),
        }

    def _reset(self) -> None:
        for watch in (self.envs_watch, self.reward_watch, self.reference_watch):
            watch.take()
