"""The common part of the single and the vector credit wrappers."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any, ClassVar, Protocol, runtime_checkable
from weakref import WeakSet

import gymnasium as gym
import numpy as np
import torch

from tokenmdp.credit import CreditMethod, Resources, make_credit
from tokenmdp.credit.weights import NEARLY_UNIFORM
from tokenmdp.envs.single import TokenEpisodes
from tokenmdp.types import Outcome
from tokenmdp.wrappers.layers import CHANGES_REWARDS, check_conversions, check_infos, check_rewards, layers

UNREAD_EPISODES = 16  # more than a conformance check of any library plays, fewer than a first rollout
EVALUATIONS = (  # modules whose functions play episodes and learn nothing
    "tokenmdp.evaluation.any_agent",
    "stable_baselines3.common.evaluation",
    "sb3_contrib.common.maskable.evaluation",
)

ROWS_JUDGED = 64  # responses whose attention is looked at before a warning about it
LEAST_DISTINCT_JUDGED = 4  # tokens: rows over fewer are uneven or even by chance
LEAST_SHARE_DISTINCT = 0.25  # of a response's tokens
MOST_DISTINCT_NEEDED = 16  # tokens: long responses and small vocabularies never reach the share


class UninformativeAttention(UserWarning):
    """The attention rows that credit follows are close to uniform."""


class UnreadTokenRewards(UserWarning):
    """Warning: episodes end, and nothing has declared that it learns from their token rewards."""


@runtime_checkable
class OffersOutcome(Protocol):
    """An unwrapped environment whose `outcome` holds what ended in the last step, else None."""

    outcome: Outcome | None


class CreditWrapper:
    """A wrapper that binds one credit method: ``info["token_rewards"] = credit(outcome)`` at the terminal step.

    Attributes:
        credit: the bound method.
        returned: the reward of the last step as this wrapper returned it, a number or (N,); what arrives further out
            is compared with it.
        readers: what reads token rewards in this process without meeting the environments, such as a replay buffer.
    """

    credit: CreditMethod
    returned: Any
    readers: ClassVar[WeakSet[Any]] = WeakSet()
    env: Any
    _warned: ClassVar[bool] = False  # of unread episodes, once per process: a batch has many wrappers
    _warned_of_attention: ClassVar[set[tuple[str, str]]] = set()  # method and model, for the same reason

    def _check_form(self, env: Any) -> None:
        """Refuse an environment of the other form.

        Raises:
            TypeError: ``env`` is single and this wraps vector environments, or the reverse.
        """
        single = isinstance(self, gym.Wrapper)
        if isinstance(env, gym.vector.VectorEnv if single else gym.Env):
            shipped = next(base for base in type(self).__mro__ if base.__module__.startswith("tokenmdp.wrappers"))
            wraps, this = ("a single", "a vector") if single else ("a vector", "a single")
            other = "tokenmdp.wrappers.vector" if single else "tokenmdp.wrappers"
            native = not single or isinstance(env.unwrapped, OffersOutcome)
            remedy = f"use {other}.{shipped.__name__}" if native else "wrap each single environment inside it"
            raise TypeError(f"{type(self).__name__} wraps {wraps} environment and this is {this} one: {remedy}")

    def _bind(self, credit: CreditMethod, needs: frozenset[str] | None = None) -> None:
        """Attach ``credit``; it needs ``credit.needs`` unless told otherwise. Called once the wrapper has its env."""
        if not callable(credit) or not hasattr(credit, "needs"):
            raise TypeError(
                f"credit is {credit!r}; pass the name of a method with its options, as in "
                'CreditReward(env, "red", credit_beta=0.5), or a method object (which a spec cannot keep as JSON)'
            )
        needs = credit.needs if needs is None else needs
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
        if needs:
            if not isinstance(base, TokenEpisodes):
                raise TypeError(
                    f"{type(self).__name__} needs {', '.join(sorted(needs))} and {type(base).__name__} cannot "
                    "ask its reward model for it; use SparseReward or UniformReward, which need the score only"
                )
            base.require(needs)
        check_conversions(self.env, type(self).__name__)
        self.credit = credit
        self.returned = None
        self._between = list(layers(self.env))[:-1]
        # A foreign environment may have rewards of its own beside the score.
        self._checks_rewards = isinstance(base, TokenEpisodes) or any(
            isinstance(layer, CHANGES_REWARDS) for layer in self._between
        )
        self._unread = 0
        self._entropies: list[float] = []  # of the first rows of attention; empty once judged
        self._judged = False
        self._credited_rows: int | None = None  # the first ones; None: all
        if isinstance(base, TokenEpisodes):
            base.credit_follows = True

    @contextlib.contextmanager
    def credit_first(self, rows: int | None) -> Iterator[None]:
        """Within the block only the first ``rows`` rows get credit, for whoever shows some of many episodes.

        The others end as without this wrapper: their infos have no ``token_rewards`` and no report, and the credit
        method does not see them. None: all rows, as outside the block. What the method needs of the reward model's
        scoring forward is still computed for every row, so scores do not change.
        """
        before, self._credited_rows = self._credited_rows, rows
        try:
            yield
        finally:
            self._credited_rows = before

    def _due(self) -> Outcome | None:
        """What ended in the last step and gets credit, else None."""
        outcome: Outcome | None = self.env.unwrapped.outcome
        if outcome is None or self._credited_rows is None:
            return outcome
        chosen = outcome.rows < self._credited_rows
        return outcome.take(chosen) if chosen.any() else None

    def _check_below(self, rewards: Any, infos: Any, ended: bool = True) -> None:
        """Refuse the rewards of a step that are not 0 and, where an episode ended in it, the score.

        Args:
            rewards: a number, or (N,).
            infos: of the step; one dictionary.
            ended: False: `outcome` is of an earlier step (a single environment that was reset by a wrapper).

        Raises:
            ChangedReward: a wrapper below has changed them.
            WrongPlace: a wrapper below has converted the infos.
        """
        check_infos(infos, type(self).__name__)
        if not self._checks_rewards:
            return
        outcome = self.env.unwrapped.outcome
        expected = np.zeros(np.shape(rewards))
        if outcome is not None and ended:
            scores = outcome.reward.score.double().numpy()
            expected[... if expected.ndim == 0 else outcome.rows.numpy()] = scores if expected.ndim else scores[0]
        check_rewards(rewards, expected, self._between, f"below {type(self).__name__}")

    def _columns(self, outcome: Outcome) -> dict[str, np.ndarray]:
        """The credit of the rows that ended: ``token_rewards`` (n, H) float32 and the method's report (n,).

        A method that does not conserve the return adds ``credit_residual = score - sum_t token_rewards[t]``, an
        ensemble of reward models ``score_sd``, the sd over its members.
        """
        base = self.env.unwrapped
        credit = self.credit(outcome, base.resources() if isinstance(base, TokenEpisodes) else Resources())
        self._check_credit(credit.token_rewards, outcome)
        columns = {"token_rewards": credit.token_rewards.float().numpy().copy()}
        columns |= {key: values.numpy().copy() for key, values in credit.report.items()}
        if outcome.reward.spread is not None:
            columns["score_sd"] = outcome.reward.spread.numpy().copy()
        if not self.credit.conserves_return:
            columns["credit_residual"] = outcome.reward.score.numpy() - columns["token_rewards"].sum(-1)
        if "attention_entropy" in columns and not self._judged:
            self._judge_attention(columns["attention_entropy"], outcome)
        if isinstance(base, TokenEpisodes):
            self._show(outcome.rows.numpy(), columns["token_rewards"])
            self._watch_readers(base, len(outcome.rows))
        return columns

    def _check_credit(self, token_rewards: torch.Tensor, outcome: Outcome) -> None:
        """Refuse credit that learners could not use; what a method computes is not checked anywhere else."""
        shape = tuple(outcome.episode.response_mask.shape)
        if tuple(token_rewards.shape) != shape:
            raise ValueError(
                f"{self.credit.name} credit returned token_rewards of shape {tuple(token_rewards.shape)}; one reward "
                f"a response slot is needed, shape {shape}"
            )
        bad = (~torch.isfinite(token_rewards)).any(-1)
        if bad.any():
            row = int(bad.nonzero()[0])
            ids = outcome.episode.input_ids[row][outcome.episode.attention_mask[row]].tolist()
            raise ValueError(
                f"{self.credit.name} credit of the text with token ids {ids} is {token_rewards[row].tolist()}; look "
                "for NaN in what the method reads (attention, gradients, log-probabilities), and use float32"
            )

    def _attending_model(self) -> str:
        """Whose attention the credit follows, for a message."""
        base = self.env.unwrapped
        if "policy_attention" in self.credit.needs or not isinstance(base, TokenEpisodes):
            return "the policy"
        return str(base.task.reward_model)

    def _show(self, rows: np.ndarray, token_rewards: np.ndarray) -> None:
        """Let `render` show the credit (n, H) of ``rows``."""
        self.env.unwrapped.token_credit[rows] = token_rewards

    def _judge_attention(self, entropy: np.ndarray, outcome: Outcome) -> None:
        """Warn once if the first rows of attention are close to uniform: such credit follows nothing.

        Responses that repeat themselves are not judged: equal tokens get equal attention, whatever the model knows. A
        trained policy may well write "brilliant brilliant brilliant".
        """
        mask = outcome.episode.response_mask
        responses = outcome.episode.input_ids[:, outcome.episode.prompt_slots :]
        distinct = np.array([len(ids[kept].unique()) for ids, kept in zip(responses, mask, strict=True)])
        share = LEAST_SHARE_DISTINCT * mask.sum(-1).numpy()
        least = np.clip(share, LEAST_DISTINCT_JUDGED, MOST_DISTINCT_NEEDED)
        self._entropies += entropy[distinct >= least].tolist()
        if len(self._entropies) < ROWS_JUDGED:
            return
        self._judged = True
        mean, model = float(np.mean(self._entropies)), self._attending_model()
        if mean > NEARLY_UNIFORM and (self.credit.name, model) not in CreditWrapper._warned_of_attention:
            CreditWrapper._warned_of_attention.add((self.credit.name, model))
            warnings.warn(
                f"the attention of {model} behind {self.credit.name} credit is close to uniform: its entropy is "
                f"{mean:.3f} of the maximum over {len(self._entropies)} responses (above {NEARLY_UNIFORM}), so this "
                "is nearly uniform credit. `tokenmdp quality --reward-model NAME` measures which method follows this "
                "model's score",
                UninformativeAttention,
                stacklevel=4,
            )

    def _watch_readers(self, base: TokenEpisodes, ended: int) -> None:
        """Warn once if Stable-Baselines3 is in use and token rewards are not read: it would train on `reward` alone.

        An evaluation in this process does not count. A worker process does not see who steps it.
        """
        if base.token_rewards_read or CreditWrapper.readers or "stable_baselines3" not in sys.modules:
            return
        if CreditWrapper._warned or _is_evaluation():
            return
        self._unread += ended
        if self._unread >= UNREAD_EPISODES:
            CreditWrapper._warned = True
            warnings.warn(
                f"{self._unread} episodes ended unread: Stable-Baselines3 learns from `reward`, the score at the end, "
                f"so {type(self).__name__} changes nothing for it. Pass callback=TokenRewardCallback() to learn() "
                "(PPO, A2C and the like) or make the model with replay_buffer_class=TokenRewardReplayBuffer (DQN); "
                "both are in tokenmdp.interop.sb3. A learner of your own that reads info['token_rewards'] sets "
                "env.unwrapped.token_rewards_read = True",
                UnreadTokenRewards,
                stacklevel=4,
            )


def _is_evaluation() -> bool:
    """Whether one of the callers evaluates. An environment has no other way to know why it is stepped."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") in EVALUATIONS:
            return True
        frame = frame.f_back
    return False


def find_credit_wrapper(env: Any) -> CreditWrapper | None:
    """The credit wrapper in a chain of wrappers, single or vector; None if there is none."""
    return next((layer for layer in layers(env) if isinstance(layer, CreditWrapper)), None)


def check_above(env: Any, rewards: Any) -> None:
    """Refuse the rewards of the last step of ``env`` that are not those that its credit wrapper returned.

    Raises:
        ChangedReward: a wrapper above the credit wrapper has changed them.
    """
    chain = list(layers(env))
    for place, layer in enumerate(chain):
        if isinstance(layer, CreditWrapper) and layer.returned is not None:
            check_rewards(rewards, layer.returned, chain[:place], f"above {type(layer).__name__}")


def method_of(credit: str | CreditMethod, options: dict[str, Any]) -> CreditMethod:
    """The method that ``credit`` names, with ``options``; a method object as it is.

    Raises:
        ValueError: no such name or option, or options for an object, which has its own.
    """
    if isinstance(credit, str):
        return make_credit(credit, **options)
    if options:
        raise ValueError(f"{credit!r} has its options already; {', '.join(options)} can be given with a name only")
    return credit
