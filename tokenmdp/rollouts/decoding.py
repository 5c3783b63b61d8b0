"""A policy writes in every row of a vector environment until all have ended; ended rows stop costing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv

from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.token_distribution import DecodeState

# A share of the batch being decoded. Leaving rows out copies the cache of the others, so it is done only when that
# pays.
SHARE_ENDED = 0.125


class Step(NamedTuple):
    """One token in each of the n rows that were decoded, and what the environment answered to all N."""

    rows: torch.Tensor  # (n,) int64, on the policy's device; every running row is among them
    token: torch.Tensor  # (n,) int64
    logprob: torch.Tensor  # (n,) float32
    value: torch.Tensor  # (n,) float32, of the state before the token
    support: torch.Tensor | None  # (n, k) int64, what the token was chosen among under top-k
    observation: dict[str, np.ndarray]
    rewards: np.ndarray  # (N,) float64
    info: dict[str, Any]


RecordAttention = Callable[[torch.Tensor], contextlib.AbstractContextManager[None]]


def uniforms_for(
    num_steps: int, num_rows: int, device: torch.device, generator: torch.Generator | None
) -> torch.Tensor:
    """(num_steps, num_rows) float64 in [0, 1): what `decode` draws with, a number for each token.

    All at once, so that neither the lengths of the texts nor the rows that are decoded together change what a row draws
    or which numbers come after. (With fewer rows together, log-probabilities may round differently in the last bit.)
    With a ``generator`` of the CPU a run on a GPU draws what one on the CPU draws.
    """
    drawn_on = device if generator is None else generator.device
    return torch.rand(num_steps, num_rows, dtype=torch.float64, device=drawn_on, generator=generator).to(device)


def decode(
    envs: VectorEnv,
    policy: CausalLMPolicy,
    state: DecodeState,
    uniforms: torch.Tensor,
    reading: RecordAttention = lambda rows: contextlib.nullcontext(),
    share_ended: float = SHARE_ENDED,
) -> Iterator[Step]:
    """Sample and step until every row has ended.

    Args:
        envs: N rows without autoreset, all running.
        policy: samples through its cache; one transfer to the host per step.
        state: of the N rows, before the next token; used up.
        uniforms: (H, N), see `uniforms_for`.
        reading: entered around the `append` of the rows it is given.
        share_ended: rows that have ended are left out once they are this share of those decoded; above 1 never.

    Raises:
        gymnasium.error.Error: a row is still running after H tokens.
    """
    num_rows, device = uniforms.shape[1], uniforms.device
    selectable = all(hasattr(layer, "batch_select_indices") for layer in state.cache.layers)
    running = np.ones(num_rows, dtype=bool)
    actions = np.zeros(num_rows, dtype=np.int64)  # the environment ignores those of ended rows
    rows_host, rows = np.arange(num_rows), torch.arange(num_rows, device=device)
    for uniform in uniforms:
        token, logprob, value = policy.act(state, uniform[rows])
        actions[rows_host] = token.cpu().numpy()
        with torch.autocast(device.type, enabled=False):  # the reward model keeps its own precision
            observation, rewards, terminated, _, info = envs.step(actions)
        running &= ~terminated
        yield Step(rows, token, logprob, value, state.support, observation, rewards, info)
        if not running.any():
            return
        goes_on = running[rows_host]
        if selectable and not goes_on.all() and (~goes_on).mean() >= share_ended:
            keep = torch.from_numpy(np.flatnonzero(goes_on)).to(device)
            state, token, rows, rows_host = policy.select(state, keep), token[keep], rows[keep], rows_host[goes_on]
        with reading(rows):
            state = policy.append(state, token)
    raise gym.error.Error(f"{running.sum()} rows did not end within {len(uniforms)} tokens; is a wrapper hiding it?")
