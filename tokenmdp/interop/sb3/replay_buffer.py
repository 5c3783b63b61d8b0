"""Token rewards for SB3's off-policy algorithms."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from tokenmdp.interop.sb3.checks import check_normalization, earned
from tokenmdp.wrappers.base import CreditWrapper


class Transition(NamedTuple):
    """One row of an open episode; it waits for its reward."""

    obs: dict[str, np.ndarray]
    next_obs: dict[str, np.ndarray]
    action: np.ndarray


class TokenRewardReplayBuffer(DictReplayBuffer):
    """A replay buffer that an episode enters when it ends, with its token rewards.

    For DQN and QRDQN: ``replay_buffer_class=TokenRewardReplayBuffer``. Until an episode ends its rows wait outside.
    ``learning_starts`` should therefore be at least the number of environments times ``max_new_tokens``, so that an
    episode is there to learn from. Under VecNormalize the rewards are stored as they are and scaled when sampled, as
    SB3 always does. A saved buffer does not hold the open episodes: the environments start anew.

    The rows of all environments form one queue of ``buffer_size`` rows, so ``buffer.n_envs`` is 1.

    While it is in use, the environments of its process do not warn that nobody reads their token rewards; for those of
    a SubprocVecEnv call `mark_token_rewards_read`.

    Raises:
        ValueError: an episode ended without token rewards, or by a TimeLimit; VecNormalize with ``norm_obs=True``;
            a sample is asked for before an episode has ended.

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
    ) -> None:
        super().__init__(
            buffer_size, observation_space, action_space, device, 1, optimize_memory_usage, handle_timeout_termination
        )
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
        """One step of every environment; ``reward`` is not used, the terminal info's token rewards are."""
        action = action.reshape(len(self._open), self.action_dim)
        for env, rows in enumerate(self._open):
            rows.append(Transition(_take(obs, env), _take(next_obs, env), action[env : env + 1].copy()))
            if done[env]:
                self._insert(rows, earned(infos[env], env))
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
        # Before a reset in mid-episode there may be rows that never end, so an episode's rows are the last ones.
        rows, token_rewards = rows[-len(token_rewards) :], token_rewards[-len(rows) :]
        for row, token_reward in zip(rows, token_rewards, strict=True):
            last = np.array([row is rows[-1]])
            super().add(row.obs, row.next_obs, row.action, np.array([token_reward]), last, [{}])

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": [[] for _ in self._open]}


def _take(obs: dict[str, np.ndarray], env: int) -> dict[str, np.ndarray]:
    """One environment's observation, with a leading axis of one."""
    return {key: values[env : env + 1].copy() for key, values in obs.items()}
