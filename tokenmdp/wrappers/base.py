"""What the single and the vector credit wrappers share."""

from __future__ import annotations

import sys
import warnings
from typing import Any, ClassVar, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np

from tokenmdp.credit import CreditMethod, Resources
from tokenmdp.env import TokenEpisodes
from tokenmdp.types import Outcome

UNREAD_EPISODES = 16  # more than a conformance check of any library plays, fewer than a first rollout


class UnreadTokenRewards(UserWarning):
    """Episodes end, and nothing has said that it learns from their token rewards."""


@runtime_checkable
class OffersOutcome(Protocol):
    """An unwrapped environment whose `outcome` holds what ended in the last step, else None."""

    outcome: Outcome | None


class CreditWrapper:
    """A wrapper that binds one credit method: ``info["token_rewards"] = credit(outcome)`` at the terminal step.

    Attributes:
        credit: the bound method.
    """

    credit: CreditMethod
    env: Any
    _warned: ClassVar[bool] = False  # of unread episodes, once a process: a batch has many wrappers

    def _bind(self, credit: CreditMethod) -> None:
        """Attach ``credit``; called once the wrapper knows its env."""
        inner = find_credit_wrapper(self.env)
        if inner is not None:
            raise ValueError(
                f"{type(self).__name__} on top of {type(inner).__name__}: an episode has one credit; "
                "wrap the environment with one of them"
            )
        base = self.env.unwrapped
        if not isinstance(base, OffersOutcome):
            raise TypeError(
                f"{type(base).__name__} has no `outcome` to credit; wrap a TextGen environment "
                "(under SyncVectorEnv wrap each single environment)"
            )
        if credit.needs:
            if not isinstance(base, TokenEpisodes):
                raise TypeError(
                    f"{type(self).__name__} needs {', '.join(sorted(credit.needs))} and {type(base).__name__} cannot "
                    "ask its reward model for it; use SparseReward or UniformReward, which need the score only"
                )
            base.require(credit.needs)
        self.credit = credit
        self._unread = 0
        if isinstance(base, TokenEpisodes):
            base.credit_follows = True

    def _columns(self, outcome: Outcome) -> dict[str, np.ndarray]:
        """The credit of the rows that ended: ``token_rewards`` (n, H) float32 and the method's report (n,).

        A method that does not conserve the return adds ``credit_residual = score - sum_t token_rewards[t]``.
        """
        base = self.env.unwrapped
        credit = self.credit(outcome, base.resources() if isinstance(base, TokenEpisodes) else Resources())
        columns = {"token_rewards": credit.token_rewards.numpy().copy()}
        columns |= {key: values.numpy().copy() for key, values in credit.report.items()}
        if not self.credit.conserves_return:
            columns["credit_residual"] = outcome.reward.score.numpy() - columns["token_rewards"].sum(-1)
        if isinstance(base, TokenEpisodes):
            base.token_credit[outcome.rows.numpy()] = columns["token_rewards"]
            self._watch_readers(base, len(outcome.rows))
        return columns

    def _watch_readers(self, base: TokenEpisodes, ended: int) -> None:
        """Warn once if Stable-Baselines3 is in use and nobody reads: it would train on `reward` alone."""
        if base.token_rewards_read or "stable_baselines3" not in sys.modules:
            return
        self._unread += ended
        if self._unread >= UNREAD_EPISODES and not CreditWrapper._warned:
            CreditWrapper._warned = True
            warnings.warn(
                f"{self._unread} episodes ended unread: Stable-Baselines3 learns from `reward`, the score at the end, "
                f"so {type(self).__name__} changes nothing for it. Train with an agent of tokenmdp.agents, or write "
                "info['token_rewards'] over the stored rewards and set env.unwrapped.token_rewards_read = True",
                UnreadTokenRewards,
                stacklevel=4,
            )


def find_credit_wrapper(env: Any) -> CreditWrapper | None:
    """The credit wrapper in a chain of wrappers, single or vector; None if there is none."""
    while True:
        if isinstance(env, CreditWrapper):
            return env
        if not isinstance(env, (gym.Wrapper, gym.vector.VectorWrapper)):
            return None
        env = env.env
