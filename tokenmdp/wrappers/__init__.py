"""Reward wrappers for a single environment: each puts one credit method's token rewards into the terminal info.

`reward` stays what it was (0.0, then the score), so any tool works as it is; a learner uses either ``reward`` or
``info["token_rewards"]``, never both. `tokenmdp.wrappers.vector` has the same names for vector environments.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from tokenmdp.credit import (
    ATTENTION_FLOOR,
    AttentionCredit,
    CreditMethod,
    PrefixDifferenceCredit,
    SparseCredit,
    UniformCredit,
)
from tokenmdp.wrappers.base import (
    CreditWrapper,
    OffersOutcome,
    UninformativeAttention,
    UnreadTokenRewards,
    find_credit_wrapper,
    method_of,
)
from tokenmdp.wrappers.layers import ChangedReward, WrongPlace
from tokenmdp.wrappers.online import PrefixLedger

__all__ = [
    "AttentionCreditReward",
    "ChangedReward",
    "CreditReward",
    "OffersOutcome",
    "OnlinePrefixReward",
    "SparseReward",
    "UniformReward",
    "UninformativeAttention",
    "UnreadTokenRewards",
    "WrongPlace",
    "find_credit_wrapper",
]


class CreditReward(CreditWrapper, gym.Wrapper, RecordConstructorArgs):
    """Any credit method: ``token_rewards = credit(outcome)`` in the terminal info. The base of those named below.

    Args:
        env: an environment with `outcome`.
        credit: a name of `tokenmdp.credit.CREDIT_METHODS`, or a method object, such as one of your own.
        **options: of the named method. A spec keeps name and options as JSON, an object it cannot.
    """

    def __init__(self, env: gym.Env, credit: str | CreditMethod, **options: Any) -> None:
        RecordConstructorArgs.__init__(self, credit=credit, **options)  # ignored if a subclass has recorded its own
        self._check_form(env)
        gym.Wrapper.__init__(self, env)
        self._bind(method_of(credit, options))

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment; the terminal info gains ``token_rewards`` and the credit method's report."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._check_below(reward, info, terminated)
        self.returned = reward
        if terminated and (outcome := self._due()) is not None:
            # Flags as Python bool: Gymnasium's vector infos turn np.bool_ into arrays of objects.
            info |= {
                key: column[0] if column.dtype.kind != "b" or column.ndim > 1 else bool(column[0])
                for key, column in self._columns(outcome).items()
            }
            if self.render_mode == "human":
                self.render()
        return obs, reward, terminated, truncated, info


class SparseReward(CreditReward):
    """``token_rewards[t] = score * 1[t = last]``: plain RLHF."""

    def __init__(self, env: gym.Env) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env, SparseCredit())


class UniformReward(CreditReward):
    """``token_rewards[t] = score / T`` over the T response tokens."""

    def __init__(self, env: gym.Env) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env, UniformCredit())


class AttentionCreditReward(CreditReward):
    """``token_rewards[t] = score * (credit_beta * alpha[t] + (1 - credit_beta) * 1[t = last])``.

    alpha is the reward model's last-layer attention row of the token it pools, averaged over heads, restricted to the
    response and renormalised. The terminal info also says ``attention_mass`` (the response's share of the row),
    ``attention_entropy`` (of alpha, as a share of its maximum) and ``credit_fallback`` (True where the mass is below
    ``attention_floor`` and alpha is uniform). If the first rows are close to uniform, `UninformativeAttention` warns;
    responses of few different tokens do not count, because equal tokens get equal attention.

    Source: Chan et al., "Dense Reward for Free in RLHF", ICML 2024.

    Args:
        env: an environment whose reward model provides "attention".
        credit_beta: 0 is sparse, 1 is dense only.
        attention_floor: the least response mass that is trusted.
    """

    def __init__(self, env: gym.Env, credit_beta: float = 0.8, attention_floor: float = ATTENTION_FLOOR) -> None:
        RecordConstructorArgs.__init__(self, credit_beta=credit_beta, attention_floor=attention_floor)
        super().__init__(env, AttentionCredit(credit_beta, attention_floor))


class OnlinePrefixReward(CreditWrapper, gym.Wrapper, RecordConstructorArgs):
    """``reward[t] = credit_beta * (score of y[<=t] - score of y[<t])`` in the step of token t; the rest at the end.

    The causal form of `tokenmdp.credit.PrefixDifferenceCredit` (RED): the same numbers, but `reward` itself is dense,
    so any tool trains on it without an adapter and nothing is buffered. The rewards of an episode sum to its score:
    learn with gamma = 1 (the default of many tools is .99). Any reward model works, also an encoder; the cost is one
    more forward per step, on the text so far. With a ``response_prefix`` the first difference starts from it. The
    terminal info holds ``token_rewards``, the same rewards again: a learner uses one or the other.

    Args:
        env: a TextGen environment.
        credit_beta: 0 is sparse, 1 is dense only.
    """

    def __init__(self, env: gym.Env, credit_beta: float = 1.0) -> None:
        RecordConstructorArgs.__init__(self, credit_beta=credit_beta)
        self._check_form(env)
        gym.Wrapper.__init__(self, env)
        self._bind(PrefixDifferenceCredit(credit_beta), needs=frozenset({"reward_calls"}))
        if any(isinstance(layer, gym.wrappers.Autoreset) for layer in self._between):
            raise WrongPlace(
                "Autoreset below OnlinePrefixReward starts episodes whose prompts are never scored; put it outside: "
                "Autoreset(OnlinePrefixReward(env))"
            )
        self._ledger = PrefixLedger(env.unwrapped, 1, credit_beta)  # type: ignore[arg-type]  # _bind has checked it

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode and score its prompt."""
        obs, info = self.env.reset(seed=seed, options=options)
        self._ledger.start(ROW)
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment; the reward is the token's own."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._check_below(reward, info, terminated)
        if not terminated:
            self.returned = float(self._ledger.pay(ROW)[0])
            return obs, self.returned, terminated, truncated, info
        reward = self._ledger.close(ROW, np.array([reward]), np.array([info["n_tokens"]]))[0]
        info["token_rewards"] = self._ledger.paid(ROW)[0]
        self._show(ROW, info["token_rewards"][None])
        if self.render_mode == "human":
            self.render()
        self.returned = float(reward)
        return obs, self.returned, terminated, truncated, info


ROW = np.array([0])  # a single environment is row 0 of one
