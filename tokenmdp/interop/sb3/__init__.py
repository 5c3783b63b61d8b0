"""Stable-Baselines3 and sb3-contrib learn from ``info["token_rewards"]``.

On-policy (PPO, A2C, TRPO, MaskablePPO, RecurrentPPO)::

    model.learn(10_000, callback=TokenRewardCallback())

Off-policy (DQN, QRDQN)::

    DQN("MultiInputPolicy", envs, replay_buffer_class=TokenRewardReplayBuffer)

Each environment of a `DummyVecEnv` or `SubprocVecEnv` has a wrapper of `tokenmdp.wrappers`; the batched environment has
one of `tokenmdp.wrappers.vector` and goes into `GymVectorToSB3`.
"""

from importlib import import_module

from gymnasium.error import DependencyNotInstalled

try:
    for _library in ("stable_baselines3", "sb3_contrib"):
        import_module(_library)
except ModuleNotFoundError as error:
    raise DependencyNotInstalled(
        f'{error.name} is not installed, run `pip install "tokenmdp[sb3]"` for tokenmdp.interop.sb3'
    ) from error

from tokenmdp.interop.reading import mark_token_rewards_read
from tokenmdp.interop.sb3.callback import TokenRewardCallback
from tokenmdp.interop.sb3.policy import (
    CausalLMActorCriticPolicy,
    CausalLMMixin,
    MaskableCausalLMActorCriticPolicy,
    causal_lm_kwargs,
)
from tokenmdp.interop.sb3.replay_buffer import TokenRewardReplayBuffer
from tokenmdp.interop.sb3.vec_env import GymVectorToSB3

__all__ = [
    "CausalLMActorCriticPolicy",
    "CausalLMMixin",
    "GymVectorToSB3",
    "MaskableCausalLMActorCriticPolicy",
    "TokenRewardCallback",
    "TokenRewardReplayBuffer",
    "causal_lm_kwargs",
    "mark_token_rewards_read",
]
