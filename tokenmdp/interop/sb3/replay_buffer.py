"""Token rewards for SB3's off-policy algorithms."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from tokenmdp.interop.sb3.checks import check_normalization, earned, of_steps
from tokenmdp.wrappers.base import CreditWrapper
from tokenmdp.wrappers.layers import check_episode


class Transition(NamedTuple):
    """One row of an open episode; it waits for its reward."""

    obs: dict[str, np.ndarray]
    next_obs: dict[str, np.ndarray]
    action: np.ndarray
    reward: float  # of the step


class TokenRewardReplayBuffer(DictReplayBuffer):
    """A replay buffer that an episode enters when it ends, with its token rewards.

    For DQN and QRDQN: ``replay_buffer_class=TokenRewardReplayBuffer``. Until an episode ends its rows wait outside.
    ``learning_starts`` should therefore be at least the number of environments times ``max_new_tokens``, so that there
    is an episode to learn from. Under VecNormalize the rewards are stored as they are and scaled when sampled, as SB3
    always does. A saved buffer does not hold the open episodes: the environments start again, and their number may
    differ. A reset in mid-episode drops the episode's rows; an episode that was reset with a ``response_prefix`` has
    more tokens than steps, and its rows get the last ones.

    The rows of all environments form one queue of ``buffer_size`` rows, so ``buffer.n_envs`` is 1.

    SB3's ``DQN(n_steps=...)`` sets up a buffer of its own, which takes no Dict observations. Here n-step returns are
    ``replay_buffer_kwargs={"n_steps": n, "gamma": gamma}``: a sample's reward is
    ``sum_{i < n} gamma^i token_rewards[t + i]``, cut at the episode's end, its next observation the one after those
    steps, and its discount ``gamma^n``. The rows in the buffer keep their own token rewards.

    While it is in use, the environments of its process do not warn that their token rewards are not read; for those of
    a SubprocVecEnv call `mark_token_rewards_read`.

    Args:
        buffer_size: rows of finished episodes; the oldest make room.
        observation_space: of a TextGen environment.
        action_space: of a TextGen environment.
        device: where samples go.
        n_envs: SB3 passes it; the number of environments is taken from the incoming steps.
        optimize_memory_usage: SB3 passes it, and refuses True for Dict observations.
        handle_timeout_termination: SB3 passes it; episodes have no timeouts.
        n_steps: steps of the return; 1 is the token's own reward.
        gamma: the model's discount factor; needed with ``n_steps > 1``.

    Raises:
        ValueError: an episode ended without token rewards, or by a TimeLimit; VecNormalize with ``norm_obs=True``;
            a sample is asked for before an episode has ended; steps outside of learn(); another number of
            environments while episodes are open; ``n_steps`` below 1, or above it without ``gamma``; rewards that a
            wrapper has changed (`ChangedReward`).

    >>> from stable_baselines3 import DQN
    >>> from stable_baselines3.common.env_util import make_vec_env
    >>> from tokenmdp.wrappers import UniformReward
    >>> envs = make_vec_env("tokenmdp:TextGen-Toy-v0", n_envs=2, wrapper_class=UniformReward)
    >>> model = DQN("MultiInputPolicy", envs, buffer_size=200, replay_buffer_class=TokenRewardReplayBuffer)
    >>> buffer = model.learn(64).replay_buffer
    >>> buffer.size() + buffer.num_open_rows
    64
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Dict,
        action_space: spaces.Space,
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        n_steps: int = 1,
        gamma: float | None = None,
    ) -> None:
        super().__init__(
            buffer_size, observation_space, action_space, device, 1, optimize_memory_usage, handle_timeout_termination
        )
        if n_steps < 1 or (n_steps > 1 and gamma is None):
            raise ValueError(
                f"n_steps={n_steps} and gamma={gamma}: n_steps is at least 1, and above 1 the buffer discounts; pass "
                'replay_buffer_kwargs={"n_steps": ..., "gamma": ...} with the model\'s own gamma'
            )
        self.n_steps, self.gamma = n_steps, 1.0 if gamma is None else gamma
        self._open: list[list[Transition]] = [[] for _ in range(n_envs)]

    @property
    def num_open_rows(self) -> int:
        """Rows that wait for their episode to end."""
        return sum(len(rows) for rows in self._open)

    def add(  # type: ignore[override]
        self,
        obs: dict[str, np.ndarray],
        next_obs: dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """One step of every environment; the terminal info's token rewards take the place of ``reward``."""
        if len(infos) != len(self._open):
            if self.num_open_rows:
                raise ValueError(
                    f"a step of {len(infos)} environments, and {self.num_open_rows} rows of {len(self._open)} others "
                    "wait for their token rewards; save and load the buffer first, which leaves those rows out"
                )
            self._open = [[] for _ in infos]
        action = action.reshape(len(self._open), self.action_dim)
        for env, rows in enumerate(self._open):
            if rows and any((after[0] != obs[key][env]).any() for key, after in rows[-1].next_obs.items()):
                rows.clear()  # reset in mid-episode: what was recorded never ends
            taken = action[env : env + 1].copy()
            rows.append(Transition(_take(obs, env), _take(next_obs, env), taken, float(reward[env])))
            if done[env]:
                token_rewards = of_steps(earned(infos[env], env), len(rows), env)
                check_episode([row.reward for row in rows], float(infos[env]["score"]), token_rewards)
                self._insert(rows, token_rewards)
                rows.clear()

    def sample(  # type: ignore[override]
        self, batch_size: int, env: VecNormalize | None = None
    ) -> DictReplayBufferSamples:
        """``batch_size`` rows, drawn with replacement from the episodes that have ended."""
        if env is not None:
            check_normalization(env)
        if self.size() == 0:
            raise ValueError(
                f"no episode has ended yet: {self.num_open_rows} rows of {len(self._open)} environments wait for their "
                "token rewards; make learning_starts at least num_envs * max_new_tokens"
            )
        return super().sample(batch_size, env)

    def _insert(self, rows: list[Transition], token_rewards: np.ndarray) -> None:
        CreditWrapper.readers.add(self)
        for row, token_reward in zip(rows, token_rewards, strict=True):
            last = np.array([row is rows[-1]])
            super().add(row.obs, row.next_obs, row.action, np.array([token_reward]), last, [{}])

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env: VecNormalize | None = None
    ) -> DictReplayBufferSamples:
        first = super()._get_samples(batch_inds, env)
        if self.n_steps == 1:
            return first
        # An episode's rows follow each other, the newest row ends one, and only the oldest are overwritten.
        rows = (batch_inds[:, None] + np.arange(self.n_steps)) % self.buffer_size  # (B, n)
        ends = self.dones[rows, 0]
        within = ends.cumsum(1) - ends == 0  # up to the episode's last row
        rewards = self._normalize_reward(self.rewards[rows, 0], env) * within * self.gamma ** np.arange(self.n_steps)
        last = super()._get_samples(rows[np.arange(len(rows)), within.sum(1) - 1], env)
        return first._replace(
            rewards=self.to_torch(rewards.sum(1, keepdims=True, dtype=np.float32)),
            next_observations=last.next_observations,
            dones=last.dones,
            discounts=torch.full_like(last.dones, self.gamma**self.n_steps),  # shorter ones end, and count nothing
        )

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": [[] for _ in self._open]}


def _take(obs: dict[str, np.ndarray], env: int) -> dict[str, np.ndarray]:
    """One environment's observation, with a leading axis of one."""
    return {key: values[env : env + 1].copy() for key, values in obs.items()}
