"""What an SB3 environment must be like for token rewards, and the terminal info that it must deliver."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

from tokenmdp.interop.sb3.vec_env import GymVectorToSB3
from tokenmdp.wrappers.base import CreditWrapper

TIME_LIMIT = (
    "a TimeLimit ends episodes before the reward model has scored them; make the environment without "
    "max_episode_steps: max_new_tokens is the limit"
)


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
    # SB3 asks with isinstance, so a mixin will do although the annotation wants a gym.Wrapper.
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


def mark_token_rewards_read(envs: VecEnv) -> None:
    """Tell every environment, also in other processes, that its token rewards are read: they will not warn.

    `TokenRewardCallback` does so itself. `TokenRewardReplayBuffer` cannot reach into the workers of a SubprocVecEnv:
    call this once before learning off-policy from one.
    """
    if isinstance(envs.unwrapped, GymVectorToSB3):
        envs.set_attr("token_rewards_read", True)
    else:
        envs.env_method("set_wrapper_attr", "token_rewards_read", True)  # set_attr stops at the outermost wrapper


def earned(info: dict[str, Any], row: int) -> np.ndarray:
    """The token rewards (T,) float32 of the episode that has just ended in ``row``, one a response token.

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


def _vec_wrappers(envs: VecEnv) -> Iterator[VecEnvWrapper]:
    while isinstance(envs, VecEnvWrapper):
        yield envs
        envs = envs.venv
