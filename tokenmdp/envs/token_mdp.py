"""The token MDP as pure functions on numpy arrays: state + token -> state.

Both environments keep one ``TokenState`` (a single environment has one row) and call these functions; nothing here
depends on Gymnasium, prompts or rewards. The slots are laid out as in `tokenmdp.types`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from tokenmdp.types import Episode


class TokenState(NamedTuple):
    """N episodes in progress. A row that was never started, or has ended, is not ``running``."""

    input_ids: np.ndarray  # (N, P+H) int64
    attention_mask: np.ndarray  # (N, P+H) bool
    n_tokens: np.ndarray  # (N,) int64, response tokens so far
    horizon: np.ndarray  # (N,) int64, response tokens at which this episode ends, <= H
    running: np.ndarray  # (N,) bool
    prompt_slots: int  # P


def blank_state(num_rows: int, prompt_slots: int, max_new_tokens: int, pad_token_id: int) -> TokenState:
    """Rows that wait for their first prompt.

    >>> blank_state(num_rows=2, prompt_slots=2, max_new_tokens=1, pad_token_id=9).input_ids.tolist()
    [[9, 9, 9], [9, 9, 9]]
    """
    slots = prompt_slots + max_new_tokens
    return TokenState(
        input_ids=np.full((num_rows, slots), pad_token_id, dtype=np.int64),
        attention_mask=np.zeros((num_rows, slots), dtype=np.bool_),
        n_tokens=np.zeros(num_rows, dtype=np.int64),
        horizon=np.full(num_rows, max_new_tokens, dtype=np.int64),
        running=np.zeros(num_rows, dtype=np.bool_),
        prompt_slots=prompt_slots,
    )


def start(
    state: TokenState,
    rows: Sequence[int],
    prompts: Sequence[Sequence[int]],
    prefixes: Sequence[Sequence[int]],
    horizons: Sequence[int],
    pad_token_id: int,
) -> TokenState:
    """Put ``prompts[i]``, left-padded, and the response so far, ``prefixes[i]``, into row ``rows[i]``.

    The row then runs until it has ``horizons[i]`` response tokens, the prefix included; a prefix is shorter.

    >>> state = start(blank_state(1, 3, 2, 9), rows=[0], prompts=[[5, 6]], prefixes=[[7]], horizons=[2], pad_token_id=9)
    >>> state.input_ids.tolist(), state.attention_mask.astype(int).tolist(), state.n_tokens.tolist()
    ([[9, 5, 6, 7, 9]], [[0, 1, 1, 1, 0]], [1])
    """
    input_ids, attention_mask = state.input_ids.copy(), state.attention_mask.copy()
    n_tokens, horizon, running = state.n_tokens.copy(), state.horizon.copy(), state.running.copy()
    for row, prompt, prefix, limit in zip(rows, prompts, prefixes, horizons, strict=True):
        taken = slice(state.prompt_slots - len(prompt), state.prompt_slots + len(prefix))
        input_ids[row] = pad_token_id
        input_ids[row, taken] = [*prompt, *prefix]
        attention_mask[row] = False
        attention_mask[row, taken] = True
        n_tokens[row], horizon[row], running[row] = len(prefix), limit, True
    return TokenState(input_ids, attention_mask, n_tokens, horizon, running, state.prompt_slots)


def append(state: TokenState, tokens: np.ndarray, eos_token_id: int | Sequence[int]) -> tuple[TokenState, np.ndarray]:
    """``state' = state + token`` in the running rows; the others ignore their token and stay as they are.

    A row ends with the end-of-text token, which belongs to the response, or at its horizon.

    Args:
        state: N rows.
        tokens: (N,) int64, in ``[0, V)`` wherever the row runs.
        eos_token_id: the id that ends a text, or several.

    Returns:
        The next state and ``ended`` (N,) bool: the rows that ended with this token.

    >>> state = start(blank_state(1, 2, 2, 9), rows=[0], prompts=[[5]], prefixes=[[]], horizons=[2], pad_token_id=9)
    >>> state, ended = append(state, np.array([7]), eos_token_id=0)
    >>> state.input_ids.tolist(), ended.tolist()
    ([[9, 5, 7, 9]], [False])
    >>> append(state, np.array([0]), eos_token_id=0)[1].tolist()
    [True]
    """
    rows = np.flatnonzero(state.running)
    slots = state.prompt_slots + state.n_tokens[rows]
    input_ids, attention_mask = state.input_ids.copy(), state.attention_mask.copy()
    input_ids[rows, slots] = tokens[rows]
    attention_mask[rows, slots] = True
    n_tokens = state.n_tokens + state.running
    ended = state.running & (np.isin(tokens, eos_token_id) | (n_tokens >= state.horizon))
    after = TokenState(input_ids, attention_mask, n_tokens, state.horizon, state.running & ~ended, state.prompt_slots)
    return after, ended


def legal_tokens(
    state: TokenState, vocab_size: int, eos_token_id: int | Sequence[int], min_new_tokens: int
) -> np.ndarray:
    """Which ids each row may take next: all, except end-of-text before ``min_new_tokens`` other tokens.

    Rows that do not run ignore their action, so everything is legal there.

    Returns:
        (N, V) bool.

    >>> state = start(blank_state(1, 2, 4, 9), rows=[0], prompts=[[5]], prefixes=[[]], horizons=[4], pad_token_id=9)
    >>> legal_tokens(state, vocab_size=3, eos_token_id=0, min_new_tokens=1).tolist()
    [[False, True, True]]
    """
    legal = np.ones((len(state.running), vocab_size), dtype=np.bool_)
    legal[:, np.atleast_1d(eos_token_id)] = (~state.running | (state.n_tokens >= min_new_tokens))[:, None]
    return legal


def response_mask(state: TokenState) -> np.ndarray:
    """``response_mask[t] = t < n_tokens`` (N, H) bool."""
    steps = np.arange(state.input_ids.shape[1] - state.prompt_slots)
    return steps < state.n_tokens[:, None]


def finished_episodes(state: TokenState, rows: np.ndarray) -> Episode:
    """The episodes of ``rows`` as fresh CPU tensors, for the reward model."""
    return Episode(
        input_ids=torch.from_numpy(state.input_ids[rows]),  # indexing by an array copies
        attention_mask=torch.from_numpy(state.attention_mask[rows]),
        response_mask=torch.from_numpy(response_mask(state)[rows]),
    )
