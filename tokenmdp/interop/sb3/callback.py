"""Token rewards for SB3's on-policy algorithms."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import obs_as_tensor

from tokenmdp.interop.sb3.checks import (
    StepRewards,
    begin_reading,
    check_token_rewards,
    earned,
    end_reading,
    of_steps,
)
from tokenmdp.interop.sb3.kept_rows import KeptRows

CutOff = Literal["complete", "drop"]


class TokenRewardCallback(BaseCallback):
    """Write ``info["token_rewards"]`` over the rewards in the rollout buffer and recompute the advantages.

    For PPO, A2C, TRPO, MaskablePPO and RecurrentPPO. An episode's token rewards are known when it ends. The rows of an
    episode that the rollout's end cuts off are dealt with as ``mode`` says:

    * "complete": the current policy plays every such episode to its end, beyond the buffer; its rows get their true
      rewards. Then all environments are reset. Tokens beyond the cut-off are not trained on, so ``n_steps`` should be
      several times the longest episode. The extra steps do not count as time steps; ``rollout/completion_steps`` logs
      them (times the number of environments).
    * "drop": no minibatch contains such a row. The episode continues in the next rollout, where its later rows are
      trained on with their true rewards. ``rollout/dropped_rows`` logs how many were left out. A last minibatch of a
      single row is left out too, because MaskablePPO and RecurrentPPO would divide by its standard deviation. In the
      buffer the reward and advantage of a dropped row are 0, and its value and return are the means of the other rows,
      so that ``train/explained_variance`` is the one of the rows that were trained on.

    The last value that an advantage bootstraps from is computed here, by the policy that collected the rollout. Under
    VecNormalize all rewards of a rollout are scaled by `normalize_reward` as it stands at the end of the rollout: one
    scale, so the parts of a score keep their proportions.

    An episode that was reset with a ``response_prefix`` has more tokens than steps; its rows get the last ones.

    Args:
        mode: "complete" or "drop".
        verbose: as for every SB3 callback.

    Raises:
        TypeError: the algorithm is not on-policy.
        ValueError: no credit wrapper, a TimeLimit, ``norm_obs=True``, a second TokenRewardCallback, one inside an
            event callback such as EveryNTimesteps, steps outside of learn(), rewards that a wrapper has changed
            (`ChangedReward`; VecNormalize may scale them), or ("drop") ``n_steps`` below the longest
            episode or too few rows to train on; in "complete" mode a short ``n_steps`` is a warning.

    >>> from stable_baselines3 import PPO
    >>> from stable_baselines3.common.env_util import make_vec_env
    >>> from tokenmdp.wrappers import UniformReward
    >>> envs = make_vec_env("tokenmdp:TextGen-Toy-v0", n_envs=2, wrapper_class=UniformReward)
    >>> model = PPO("MultiInputPolicy", envs, n_steps=32, batch_size=32, n_epochs=1, device="cpu")
    >>> model.learn(64, callback=TokenRewardCallback()).num_timesteps
    64
    """

    model: OnPolicyAlgorithm

    def __init__(self, mode: CutOff = "complete", verbose: int = 0) -> None:
        super().__init__(verbose)
        if mode not in ("complete", "drop"):
            raise ValueError(f"mode={mode!r} is not one of 'complete', 'drop'")
        self.mode = mode
        self._ended: list[tuple[int, int, np.ndarray]] = []  # row, environment and rewards of an episode that ended
        self._checked_horizon = False

    def _init_callback(self) -> None:
        if isinstance(self.model, OffPolicyAlgorithm):
            raise TypeError(
                f"{type(self.model).__name__} learns from a replay buffer; make it with "
                "replay_buffer_class=TokenRewardReplayBuffer and leave out TokenRewardCallback"
            )
        if not isinstance(self.model, OnPolicyAlgorithm):
            raise TypeError(
                f"{type(self.model).__name__} has no rollout buffer; TokenRewardCallback is for PPO, A2C, TRPO, "
                "MaskablePPO and RecurrentPPO"
            )

    def _on_training_start(self) -> None:
        if self.parent is not None:
            raise ValueError(
                f"TokenRewardCallback is inside {type(self.parent).__name__}, which does not tell it when a rollout "
                "ends; pass it to learn() itself, in a list with the others"
            )
        ours = [found for found in _in_lists(self.locals["callback"]) if isinstance(found, TokenRewardCallback)]
        if len(ours) > 1:
            modes = ", ".join(repr(callback.mode) for callback in ours)
            raise ValueError(
                f"{len(ours)} TokenRewardCallbacks (modes {modes}) in one learn(): each would play on from where the "
                "other has left the environments; pass one"
            )
        check_token_rewards(self.training_env)
        begin_reading(self.training_env, self.logger)
        self._stepped = StepRewards(self.training_env, self.model.get_vec_normalize_env())

    def _on_rollout_start(self) -> None:
        self._ended.clear()
        self._forget_kept_rows()

    def _on_step(self) -> bool:
        self._stepped.add(*(self.locals[name] for name in ("rewards", "dones", "infos")))
        for env in np.flatnonzero(self.locals["dones"]).tolist():
            info = self.locals["infos"][env]
            rewards = earned(info, env)
            self._check_horizon(len(info["token_rewards"]))
            self._ended.append((self.model.rollout_buffer.pos, env, rewards))  # pos: the row that is filled next
        return True

    def _on_rollout_end(self) -> None:
        model, buffer = self.model, self.model.rollout_buffer
        dones = np.asarray(model._last_episode_starts, dtype=np.bool_)  # of the last row
        last_values = self._last_values()  # before the completion moves on
        rewards = np.zeros_like(buffer.rewards)
        for row, env, token_rewards in self._ended:
            _write_back(rewards, buffer.episode_starts, row, env, token_rewards)
        kept = np.ones(rewards.shape, dtype=np.bool_)
        if self.mode == "drop":
            kept = self._finished_rows()
        elif not dones.all():
            for env, token_rewards in self._complete(~dones).items():
                _write_back(rewards, buffer.episode_starts, len(rewards) - 1, env, token_rewards)
            self._reset()
        normalizer = model.get_vec_normalize_env()
        buffer.rewards[:] = rewards if normalizer is None else normalizer.normalize_reward(rewards)
        buffer.compute_returns_and_advantage(last_values=last_values, dones=dones)
        if self.mode == "drop":
            self._drop(buffer, kept)

    def _on_training_end(self) -> None:
        end_reading(self.training_env, self.logger)
        self._forget_kept_rows()

    def _forget_kept_rows(self) -> None:
        vars(self.model.rollout_buffer).pop("get", None)

    @property
    def _recurrent(self) -> bool:
        return isinstance(self.model, RecurrentPPO)

    def _check_horizon(self, horizon: int) -> None:
        """Say once if a rollout is shorter than the longest episode can be."""
        n_steps = self.model.n_steps
        if self._checked_horizon or n_steps >= horizon:
            return
        self._checked_horizon = True
        short = f"n_steps={n_steps} is less than the {horizon} steps that an episode may take"
        if self.mode == "drop":
            raise ValueError(
                f"{short}, and mode='drop' trains only on episodes that end within a rollout; make n_steps at least "
                f"{horizon}, better several times that"
            )
        warnings.warn(
            f"{short}: mode='complete' starts every rollout with new episodes, so tokens from {n_steps} on are never "
            f"trained on; make n_steps several times {horizon}",
            stacklevel=2,
        )

    def _last_values(self) -> torch.Tensor:
        """The values (N,) of the observations after the last row."""
        model: Any = self.model
        obs = obs_as_tensor(model._last_obs, model.device)
        with torch.no_grad():
            if self._recurrent:
                starts = torch.as_tensor(model._last_episode_starts, dtype=torch.float32, device=model.device)
                return model.policy.predict_values(obs, model._last_lstm_states.vf, starts)
            return model.policy.predict_values(obs)

    def _complete(self, cut_off: np.ndarray) -> dict[int, np.ndarray]:
        """Play the episodes of the environments ``cut_off`` (N,) bool to their end.

        Returns:
            For each of them the token rewards of the tokens before the cut.
        """
        model: Any = self.model
        envs, obs, starts = self.training_env, model._last_obs, model._last_episode_starts
        model._last_obs = None  # SB3 resets if it finds none, as it must after an interruption in here
        state = None
        if self._recurrent:
            state = tuple(layer.cpu().numpy() for layer in model._last_lstm_states.pi)
        waiting, steps, before = cut_off.copy(), 0, {}
        while waiting.any():
            # Only in a local variable of MaskablePPO, whose learn() has the switch.
            masked = self.locals.get("use_masking", False)
            masks = {"action_masks": np.stack(envs.env_method("action_masks"))} if masked else {}
            actions, state = model.predict(obs, state=state, episode_start=starts, **masks)
            obs, rewards, starts, infos = envs.step(actions)
            self._stepped.add(rewards, starts, infos)
            steps += 1
            for env in np.flatnonzero(starts & waiting).tolist():
                token_rewards = earned(infos[env], env)
                self._check_horizon(len(infos[env]["token_rewards"]))
                before[env] = token_rewards[:-steps]
                model._update_info_buffer([infos[env]], np.array([True]))
            waiting &= ~starts
        self.logger.record_mean("rollout/completion_steps", steps)
        return before

    def _reset(self) -> None:
        """Start the next rollout with new episodes everywhere."""
        model: Any = self.model
        self._stepped.clear()
        model._last_obs = self.training_env.reset()
        model._last_episode_starts = np.ones(self.training_env.num_envs, dtype=np.bool_)
        if self._recurrent:
            model._last_lstm_states = RNNStates(
                *(tuple(torch.zeros_like(layer) for layer in states) for states in model._last_lstm_states)
            )

    def _finished_rows(self) -> np.ndarray:
        """(n_steps, N) bool: the rows of episodes that ended in this rollout."""
        n_steps, num_envs = self.model.n_steps, self.training_env.num_envs
        ends = np.zeros(num_envs, dtype=np.int64)  # rows up to the last end
        for row, env, _ in self._ended:
            ends[env] = row + 1
        if not ends.all():
            raise ValueError(
                f"n_steps={n_steps} holds no whole episode of environment {np.flatnonzero(ends == 0)[0]}, and "
                "mode='drop' trains only on episodes that end within a rollout; make n_steps several times "
                "max_new_tokens"
            )
        kept = np.arange(n_steps)[:, None] < ends
        if kept.sum() < 2:
            raise ValueError(
                f"only {kept.sum()} of the {kept.size} rows of a rollout (n_steps={n_steps}, n_envs={num_envs}) is of "
                "an episode that ended in it, and mode='drop' needs 2 to train on; make n_steps several times "
                "max_new_tokens"
            )
        return kept

    def _drop(self, buffer: RolloutBuffer, kept: np.ndarray) -> None:
        buffer.advantages[~kept] = 0.0
        # SB3 logs 1 - Var(returns - values) / Var(returns) of all rows. Means scale both variances alike.
        for column in (buffer.values, buffer.returns):
            column[~kept] = column[kept].mean()
        # An instance's own entry, because SB3 has no other place to say which rows a minibatch may draw from.
        vars(buffer)["get"] = KeptRows(buffer, kept)
        self.logger.record_mean("rollout/dropped_rows", int((~kept).sum()))


def _write_back(rewards: np.ndarray, starts: np.ndarray, row: int, env: int, token_rewards: np.ndarray) -> None:
    """The last of the token rewards (T,) into the rows of ``rewards`` (n_steps, N) up to ``row`` of their episode.

    ``starts`` (n_steps, N) marks the first row of each episode; one that began in an earlier rollout has all rows here.

    >>> rewards, starts = np.zeros((4, 1)), np.array([[0], [0], [1], [0]])
    >>> _write_back(rewards, starts, row=1, env=0, token_rewards=np.array([1.0, 2.0, 3.0]))
    >>> _write_back(rewards, starts, row=3, env=0, token_rewards=np.array([4.0, 5.0, 6.0]))
    >>> rewards[:, 0].tolist()
    [2.0, 3.0, 5.0, 6.0]
    """
    first = max(np.flatnonzero(starts[: row + 1, env]).tolist(), default=0)
    rewards[first : row + 1, env] = of_steps(token_rewards, row + 1 - first, env)


def _in_lists(callback: BaseCallback) -> Iterator[BaseCallback]:
    """The callbacks that SB3 calls at the end of a rollout."""
    if isinstance(callback, CallbackList):
        for inner in callback.callbacks:
            yield from _in_lists(inner)
    else:
        yield callback
