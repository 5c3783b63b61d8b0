"""Reward wrappers for vector environments; names, equations and arguments as in `tokenmdp.wrappers`."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode

from tokenmdp.credit import (
    ATTENTION_FLOOR,
    AttentionCredit,
    CreditMethod,
    PrefixDifferenceCredit,
    SparseCredit,
    UniformCredit,
)
from tokenmdp.envs.vector import spread_columns
from tokenmdp.wrappers.base import CreditWrapper, find_credit_wrapper, method_of
from tokenmdp.wrappers.online import PrefixLedger

__all__ = [
    "AttentionCreditReward",
    "CreditReward",
    "OnlinePrefixReward",
    "SparseReward",
    "UniformReward",
    "find_credit_wrapper",
]


class CreditReward(CreditWrapper, gym.vector.VectorWrapper, RecordConstructorArgs):
    """Any credit method: ``token_rewards = credit(outcome)`` in the terminal info. The base of those named below.

    Args:
        env: an environment with `outcome`.
        credit: a name of `tokenmdp.credit.CREDIT_METHODS`, or a method object, such as one of your own.
        **options: of the named method. A spec keeps name and options as JSON, an object it cannot.
    """

    def __init__(self, env: gym.vector.VectorEnv, credit: str | CreditMethod, **options: Any) -> None:
        RecordConstructorArgs.__init__(self, credit=credit, **options)  # ignored if a subclass has recorded its own
        self._check_form(env)
        gym.vector.VectorWrapper.__init__(self, env)
        self._bind(method_of(credit, options))

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """The environment's mode; VectorWrapper forwards the metadata but no attribute."""
        return self.metadata["autoreset_mode"]

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step the environments; rows that ended gain ``token_rewards`` and the credit method's report."""
        obs, rewards, terminations, truncations, infos = self.env.step(actions)
        self._check_below(rewards, infos)
        self.returned = np.array(rewards)
        if (outcome := self._due()) is not None:
            where = np.zeros(self.num_envs, dtype=np.bool_)
            where[outcome.rows.numpy()] = True
            final = infos["final_info"] if self.autoreset_mode is AutoresetMode.SAME_STEP else infos
            final |= spread_columns(self._columns(outcome), where)
        if self.render_mode == "human" and self.env.unwrapped.outcome is not None:
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


class OnlinePrefixReward(CreditWrapper, gym.vector.VectorWrapper, RecordConstructorArgs):
    """``reward[t] = credit_beta * (score of y[<=t] - score of y[<t])`` in the step of token t; the rest at the end.

    See `tokenmdp.wrappers.OnlinePrefixReward`. One forward per step covers all rows that continue, and one more those
    that start. It needs the scores when rows end: ``score_when="all_done"`` is refused.
    """

    def __init__(self, env: gym.vector.VectorEnv, credit_beta: float = 1.0) -> None:
        RecordConstructorArgs.__init__(self, credit_beta=credit_beta)
        self._check_form(env)
        gym.vector.VectorWrapper.__init__(self, env)
        self._bind(PrefixDifferenceCredit(credit_beta), needs=frozenset({"reward_calls"}))
        base: Any = env.unwrapped
        if base.score_when != "ended":
            raise ValueError(
                f"score_when={base.score_when!r} delays the scores that the last rewards are made of; make the "
                "environment with score_when='ended'"
            )
        self._ledger = PrefixLedger(base, self.num_envs, credit_beta)
        self._ended = np.ones(self.num_envs, dtype=np.bool_)  # rows without a running episode

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """The environment's mode; VectorWrapper forwards the metadata but no attribute."""
        return self.metadata["autoreset_mode"]

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start episodes and score their prompts."""
        obs, infos = self.env.reset(seed=seed, options=options)
        chosen = (options or {}).get("reset_mask")
        started = np.arange(self.num_envs) if chosen is None else np.flatnonzero(chosen)
        self._ledger.start(started)
        self._ended[started] = False
        return obs, infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step the environments; each row's reward is its token's own."""
        obs, rewards, terminations, truncations, infos = self.env.step(actions)
        self._check_below(rewards, infos)
        waited, mode = self._ended, self.autoreset_mode
        goes_on = np.flatnonzero(~waited & ~terminations)
        if goes_on.size:
            rewards[goes_on] = self._ledger.pay(goes_on)
        ended = np.flatnonzero(terminations)
        if ended.size:
            final = infos["final_info"] if mode is AutoresetMode.SAME_STEP else infos
            rewards[ended] = self._ledger.close(ended, rewards[ended], final["n_tokens"][ended])
            token_rewards = self._ledger.paid(ended)
            final |= spread_columns({"token_rewards": token_rewards}, terminations)
            self._show(ended, token_rewards)
        self.returned = np.array(rewards)
        if mode is AutoresetMode.DISABLED:
            self._ended = waited | terminations
        else:
            started = np.flatnonzero(terminations if mode is AutoresetMode.SAME_STEP else waited)
            if started.size:
                self._ledger.start(started)
            self._ended = terminations & (mode is AutoresetMode.NEXT_STEP)
        if ended.size and self.render_mode == "human":
            self.render()
        return obs, rewards, terminations, truncations, infos
