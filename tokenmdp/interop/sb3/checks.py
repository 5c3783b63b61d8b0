"""Checks that an SB3 environment is fit for token rewards, what it is told, and what it must deliver."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecMonitor, VecNormalize

from tokenmdp.interop.reading import TIME_LIMIT, mark_token_rewards_read
from tokenmdp.interop.sb3.vec_env import GymVectorToSB3
from tokenmdp.wrappers.base import CreditWrapper
from tokenmdp.wrappers.layers import SCALING, ChangedReward, check_episode, layers, same_rewards, suspects

# The value of `token_rewards_read` in environments of other processes before a learn() that has not ended yet.
_BEFORE_LEARNING: WeakKeyDictionary[VecEnv, list[bool]] = WeakKeyDictionary()


def check_token_rewards(envs: VecEnv) -> None:
    """Refuse environments without token rewards, or with something around them that falsifies what is learned.

    Raises:
        ValueError: no credit wrapper, a TimeLimit, or VecNormalize with ``norm_obs=True``.
    """
    for layer in _vec_wrappers(envs):
        if isinstance(layer, VecNormalize):
            check_normalization(layer)
    if any(envs.env_is_wrapped(TimeLimit)):
        raise ValueError(TIME_LIMIT)
    # SB3 asks with isinstance, so a mixin works although the annotation asks for a gym.Wrapper.
    without = [row for row, found in enumerate(envs.env_is_wrapped(CreditWrapper)) if not found]  # type: ignore[arg-type]
    if without:
        raise ValueError(
            f"environment {without[0]} gives no token_rewards: it has no credit wrapper; wrap it with one of "
            "tokenmdp.wrappers, for example SparseReward(env) (a batched one: tokenmdp.wrappers.vector)"
        )


def check_normalization(normalizer: VecNormalize) -> None:
    """Refuse a normalizer of observations."""
    if normalizer.norm_obs:
        raise ValueError(
            "VecNormalize(norm_obs=True) would turn token ids into scaled floats; pass norm_obs=False "
            "(norm_reward=True is fine)"
        )


@mark_token_rewards_read.register
def _(envs: VecEnv) -> None:
    """Tell every environment, also in other processes, that its token rewards are read: they will not warn.

    `TokenRewardCallback` does this while it learns. `TokenRewardReplayBuffer` cannot reach into the workers
    of a SubprocVecEnv: call this once before learning off-policy from one.
    """
    _BEFORE_LEARNING.pop(envs.unwrapped, None)
    if isinstance(envs.unwrapped, GymVectorToSB3):
        envs.set_attr("token_rewards_read", True)
    else:
        envs.env_method("set_wrapper_attr", "token_rewards_read", True)  # set_attr stops at the outermost wrapper


def begin_reading(envs: VecEnv, logger: Logger) -> None:
    """Declare that the learn() that logs to ``logger`` reads the token rewards of ``envs``, until `end_reading`.

    SB3 calls nothing when an exception ends learn(). But every learn() makes its model a new logger, unless the user
    has set one, so the weak reference to the old one says that a run is over. Environments in other processes are
    marked instead, and are set back to what they were when the next run with them ends.
    """
    CreditWrapper.readers.add(logger)
    base = envs.unwrapped
    if not isinstance(base, (DummyVecEnv, GymVectorToSB3)):
        before = _BEFORE_LEARNING.get(base) or envs.get_attr("token_rewards_read")
        mark_token_rewards_read(envs)
        _BEFORE_LEARNING[base] = before


def end_reading(envs: VecEnv, logger: Logger) -> None:
    """Undo what `begin_reading` declared."""
    CreditWrapper.readers.discard(logger)
    for row, read in enumerate(_BEFORE_LEARNING.pop(envs.unwrapped, ())):
        envs.env_method("set_wrapper_attr", "token_rewards_read", read, indices=row)


def earned(info: dict[str, Any], row: int) -> np.ndarray:
    """The token rewards (T,) float32 of the episode that has just ended in ``row``, one per response token.

    Raises:
        ValueError: the info has none, or a time limit has cut the episode off.
    """
    if info.get("TimeLimit.truncated", False):
        raise ValueError(TIME_LIMIT)
    if "token_rewards" not in info:
        raise ValueError(
            f"an episode of environment {row} ended without info['token_rewards']; wrap the environment with one of "
            "tokenmdp.wrappers, for example SparseReward(env)"
        )
    return info["token_rewards"][info["token_mask"]]  # (H,), (H,) -> (T,)


def of_steps(token_rewards: np.ndarray, steps: int, row: int) -> np.ndarray:
    """The token rewards of the last ``steps`` of an episode; those before belong to a ``response_prefix``.

    Raises:
        ValueError: more steps than tokens.
    """
    if steps > len(token_rewards):
        raise ValueError(
            f"an episode of {len(token_rewards)} tokens ended in environment {row}, and {steps} steps of it were "
            "recorded: something else has stepped or reset the environment; evaluate with environments of their own"
        )
    return token_rewards[len(token_rewards) - steps :]


class StepRewards:
    """The rewards of the running episode of each environment, to see at its end that no wrapper has changed them.

    Args:
        envs: as the algorithm steps them.
        normalizer: the VecNormalize among their wrappers, whose scaling token rewards share.
    """

    def __init__(self, envs: VecEnv, normalizer: VecNormalize | None) -> None:
        self._envs, self._normalizer = envs, normalizer
        self._rewards: list[list[float]] = [[] for _ in range(envs.num_envs)]

    def add(self, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """One step of every environment: rewards (N,) and dones (N,) as they arrived, and the infos.

        Raises:
            ChangedReward: the rewards of an episode that ended are not its score, or what OnlinePrefixReward pays.
        """
        if self._normalizer is not None:
            original = self._normalizer.get_original_reward()
            outside = [layer for layer in _vec_wrappers(self._envs) if not isinstance(layer, VecNormalize)]
            names = " or ".join(type(layer).__name__ for layer in outside) or "something"
            if not same_rewards(rewards, self._normalizer.normalize_reward(original)).all():
                raise ChangedReward(f"{names} has changed the rewards that VecNormalize returned. {SCALING}")
            rewards = original
        for env, (reward, done) in enumerate(zip(rewards, dones, strict=True)):
            self._rewards[env].append(float(reward))
            if done:
                stepped, token_rewards = self._rewards[env], earned(infos[env], env)
                self._rewards[env] = []
                known = stepped[-len(token_rewards) :]
                check_episode(known, float(infos[env]["score"]), token_rewards, self._changers)

    def clear(self) -> None:
        """All environments start new episodes."""
        for rewards in self._rewards:
            rewards.clear()

    def _changers(self) -> str:
        """The names of the wrappers that may have changed the rewards."""
        envs, base = self._envs, self._envs.unwrapped
        outside = [
            type(layer).__name__ for layer in _vec_wrappers(envs) if not isinstance(layer, VecNormalize | VecMonitor)
        ]
        if isinstance(base, DummyVecEnv | GymVectorToSB3):
            chain = layers(base.envs[0] if isinstance(base, DummyVecEnv) else base.envs)
            outside.append(suspects(layer for layer in chain if not isinstance(layer, CreditWrapper | Monitor)))
        else:
            outside.append(f"a wrapper in {envs.env_method('__str__', indices=0)[0]}")
        return " or ".join(outside)


def _vec_wrappers(envs: VecEnv) -> Iterator[VecEnvWrapper]:
    while isinstance(envs, VecEnvWrapper):
        yield envs
        envs = envs.venv
