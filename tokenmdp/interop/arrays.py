"""Token rewards for hand-written loops, whose rollouts are arrays of shape (num_steps, num_envs).

    mark_token_rewards_read(envs)
    known = np.zeros((num_steps, num_envs), dtype=bool)
    for t in range(num_steps):
        ...                                                        # actions from the policy
        obs, rewards[t], terminated, truncated, infos = envs.step(actions)
        relabel(rewards, t, infos, known)
    ...                                                            # GAE as usual; then learn from the rows in `known`

Works for the native vector environment and for Gymnasium's SyncVectorEnv and AsyncVectorEnv, in all autoreset modes.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from tokenmdp.interop.reading import mark_token_rewards_read, no_token_rewards
from tokenmdp.wrappers.layers import check_episode, check_infos

__all__ = ["mark_token_rewards_read", "relabel"]


def relabel(rewards: Any, t: int, infos: dict[str, Any], known: np.ndarray | None = None) -> None:
    """``rewards[t-k+1 : t+1, i] = token_rewards[i, n-k : n]`` for each row i whose n-token episode ended in step t.

    ``k = min(n, t + 1)``: an episode that began before this rollout has only its last k tokens here. Call it once per
    step, in order, after ``rewards[t]`` was filled.

    Some rows of a rollout have no token reward, and ``known`` tells them apart: it ends up True exactly where a token
    reward was written. False are the tokens of episodes still running at the rollout's end (their credit is not
    decided, their reward is the 0.0 of the step), the reset pseudo-steps of "NextStep" and the steps in which a row of
    "Disabled" waits. Leave those rows out of the minibatches. GAE may run over them: all of them lie behind a terminal
    step or at the end of the rollout, so nothing of theirs flows into a known row.

    Start no episode with a ``response_prefix``: it has more tokens than steps, and the infos do not say how many more.
    ``known`` shows when its tokens would reach into the rows of the episode before, which is refused.

    Args:
        rewards: (num_steps, num_envs) float array or tensor, changed in place.
        t: the step that was just taken.
        infos: of that step, with ``final_info`` in "SameStep".
        known: (num_steps, num_envs) bool array or tensor, changed in place.

    Raises:
        gymnasium.error.Error: an episode ended without token rewards, or has more tokens than steps.
        ChangedReward: the rewards are not those of the steps: a reward wrapper would have no effect.

    >>> rewards, known = np.zeros((4, 1)), np.zeros((4, 1), dtype=bool)
    >>> rewards[2] = 6.0                                                          # the score, in the last step
    >>> ended = {"n_tokens": np.array([2]), "token_rewards": np.array([[1.0, 5.0, 0.0]]), "_token_rewards": [True]}
    >>> relabel(rewards, 2, ended, known)
    >>> rewards[:, 0].tolist(), known[:, 0].tolist()
    ([0.0, 1.0, 5.0, 0.0], [False, True, True, False])
    """
    if known is not None:
        known[t] = False  # what an earlier rollout left here
    check_infos(infos, "relabel")
    ended = infos.get("final_info", infos)
    if "score" in ended and "token_rewards" not in ended:
        raise gym.error.Error(no_token_rewards(vector=True))
    for i in np.flatnonzero(ended.get("_token_rewards", ())):
        n = int(ended["n_tokens"][i])
        k = min(n, t + 1)
        if known is not None and known[t - k + 1 : t + 1, i].any():
            raise gym.error.Error(
                f"row {i} ended an episode of {n} tokens in step {t}, and the one before it ended less than {n} steps "
                "ago: it was reset with a response_prefix, whose tokens have no steps, or relabel was not called in "
                "every step; reset without a prefix and call relabel once a step"
            )
        if "score" in ended:
            stepped = rewards[t - k + 1 : t + 1, i]
            stepped = stepped if isinstance(stepped, np.ndarray) else stepped.detach().cpu().numpy()
            check_episode(stepped, float(ended["score"][i]), ended["token_rewards"][i, :n])
        rewards[t - k + 1 : t + 1, i] = _like(rewards, ended["token_rewards"][i, n - k : n])
        if known is not None:
            known[t - k + 1 : t + 1, i] = True


def _like(rewards: Any, values: np.ndarray) -> Any:
    """``values`` as an assignment to ``rewards`` takes them: tensors do not take arrays."""
    return values if isinstance(rewards, np.ndarray) else rewards.new_tensor(values)
