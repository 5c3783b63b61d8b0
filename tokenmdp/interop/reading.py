"""What every adapter does first: check that token rewards will arrive, and declare that something learns from them."""

from __future__ import annotations

from functools import singledispatch
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from tokenmdp.envs.single import TokenEpisodes
from tokenmdp.envs.vector import TextGenVectorEnv
from tokenmdp.wrappers import find_credit_wrapper

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

TIME_LIMIT = (
    "a TimeLimit ends episodes before the reward model has scored them; make the environment without "
    "max_episode_steps: max_new_tokens is the limit"
)


@singledispatch
def mark_token_rewards_read(env: gym.Env | gym.vector.VectorEnv | VecEnv) -> None:
    """Declare that a learner reads ``info["token_rewards"]`` of ``env``, so that no wrapper warns about unread ones.

    Takes a TextGen environment, single or vector, under a credit wrapper; or many single ones, in Gymnasium's
    SyncVectorEnv or AsyncVectorEnv or, with `tokenmdp.interop.sb3` imported, in a VecEnv of Stable-Baselines3. The
    wrappers in the last two are not looked at: they may live in other processes.

    Raises:
        gymnasium.error.Error: no credit wrapper, a TimeLimit, or scores that come later than the end of their row.
        TypeError: it is not a TextGen environment.
    """
    base: Any = env.unwrapped
    if isinstance(base, gym.vector.SyncVectorEnv):
        for single in base.envs:
            mark_token_rewards_read(single)
        return
    if isinstance(base, gym.vector.AsyncVectorEnv):
        base.set_attr("token_rewards_read", True)
        return
    if not isinstance(base, TokenEpisodes):
        raise TypeError(
            f"{type(base).__name__} gives no token rewards; pass a TextGen environment, or for a "
            "VecEnv of Stable-Baselines3 import tokenmdp.interop.sb3 before"
        )
    if find_credit_wrapper(env) is None:
        raise gym.error.Error(no_token_rewards(vector=isinstance(env, gym.vector.VectorEnv)))
    if _has_time_limit(env):
        raise gym.error.Error(TIME_LIMIT)
    if isinstance(base, TextGenVectorEnv) and base.score_when != "ended":
        raise gym.error.Error(
            f"score_when={base.score_when!r} delivers token rewards later than in the last step of their row, so they "
            'would be written over the wrong steps; make the environment with score_when="ended"'
        )
    base.token_rewards_read = True


def _has_time_limit(env: Any) -> bool:
    while isinstance(env, gym.Wrapper):
        if isinstance(env, gym.wrappers.TimeLimit):
            return True
        env = env.env
    return False


def no_token_rewards(vector: bool) -> str:
    """The message for an environment without a credit wrapper."""
    module = "tokenmdp.wrappers.vector" if vector else "tokenmdp.wrappers"
    return (
        "the episode ended without token_rewards because no credit wrapper is on the environment; "
        f"for plain RLHF wrap it: {module}.SparseReward(env)"
    )
