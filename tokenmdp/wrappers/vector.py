"""Reward wrappers for vector environments; names, equations and arguments as in `tokenmdp.wrappers`."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode

from tokenmdp.credit import ATTENTION_FLOOR, AttentionCredit, CreditMethod, SparseCredit, UniformCredit
from tokenmdp.vector_env import spread_columns
from tokenmdp.wrappers.base import CreditWrapper, find_credit_wrapper

__all__ = ["AttentionCreditReward", "CreditReward", "SparseReward", "UniformReward", "find_credit_wrapper"]


class CreditReward(CreditWrapper, gym.vector.VectorWrapper, RecordConstructorArgs):
    """Any credit method: ``token_rewards = credit(outcome)`` in the terminal info. The base of those named below.

    Args:
        env: an environment with `outcome`.
        credit: the method, such as ``AttentionCredit(credit_beta=0.5)`` or one of your own.
    """

    def __init__(self, env: gym.vector.VectorEnv, credit: CreditMethod) -> None:
        RecordConstructorArgs.__init__(self, credit=credit)  # ignored after a subclass has recorded its own
        gym.vector.VectorWrapper.__init__(self, env)
        self._bind(credit)

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """The environment's mode; VectorWrapper forwards the metadata but no attribute."""
        return self.metadata["autoreset_mode"]

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step the environments; rows that ended gain ``token_rewards`` and the credit method's report."""
        obs, rewards, terminations, truncations, infos = self.env.step(actions)
        outcome = self.env.unwrapped.outcome
        if outcome is not None:
            where = np.zeros(self.num_envs, dtype=np.bool_)
            where[outcome.rows.numpy()] = True
            final = infos["final_info"] if self.autoreset_mode is AutoresetMode.SAME_STEP else infos
            final |= spread_columns(self._columns(outcome), where)
            if self.render_mode == "human":
                self.render()
        return obs, rewards, terminations, truncations, infos


class SparseReward(CreditReward):
    """``token_rewards[t] = score * 1[t = last]``: plain RLHF."""

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env, SparseCredit())


class UniformReward(CreditReward):
    """``token_rewards[t] = score / T`` over the T response tokens."""

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env, UniformCredit())


class AttentionCreditReward(CreditReward):
    """``token_rewards[t] = score * (credit_beta * alpha[t] + (1 - credit_beta) * 1[t = last])``.

    See `tokenmdp.wrappers.AttentionCreditReward` for alpha, the report and the arguments.
    """

    def __init__(
        self, env: gym.vector.VectorEnv, credit_beta: float = 0.8, attention_floor: float = ATTENTION_FLOOR
    ) -> None:
        RecordConstructorArgs.__init__(self, credit_beta=credit_beta, attention_floor=attention_floor)
        super().__init__(env, AttentionCredit(credit_beta, attention_floor))
