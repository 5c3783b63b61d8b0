"""Minibatches from some rows of a rollout buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
from stable_baselines3.common.buffers import RolloutBuffer


class KeptRows:
    """Replaces a rollout buffer's `get`: minibatches of the kept rows only.

    It serves one rollout. In the next one, which begins with `reset`, the class's own `get` is back; pickles and copies
    of the buffer have that one, too. So nothing of it remains after an interrupted training.

    Args:
        buffer: a full buffer, plain, maskable or recurrent.
        kept: (n_steps, N) bool. A recurrent buffer's sequences stay whole if only an environment's last rows are left
            out, and not all of them. Two rows at least.
    """

    def __init__(self, buffer: RolloutBuffer, kept: np.ndarray) -> None:
        self._buffer, self._kept = buffer, kept
        self._rewards = buffer.rewards  # `reset` makes a new array, `get` leaves it

    def __call__(self, batch_size: int | None = None) -> Iterator[Any]:
        """Each kept row once, in random order (recurrent: in order from a random row on).

        A last minibatch of one row is left out: its advantage would be divided by a standard deviation of 0.
        """
        buffer: Any = self._buffer
        if buffer.rewards is not self._rewards:
            vars(buffer).pop("get", None)
            yield from buffer.get(batch_size)
            return
        next(type(buffer).get(buffer, 1))  # lays the arrays out environment by environment
        rows = np.flatnonzero(self._kept.T)  # (n_steps, N) -> row numbers in that layout
        further = []
        if isinstance(buffer, (RecurrentRolloutBuffer, RecurrentDictRolloutBuffer)):
            first = np.zeros(self._kept.shape)
            first[0] = 1.0  # where the rows of the next environment begin
            further = [buffer.swap_and_flatten(first)]
            rows = np.roll(rows, -np.random.randint(len(rows)))  # noqa: NPY002  # SB3's seed sets numpy's global state
        else:
            rows = np.random.permutation(rows)  # noqa: NPY002
        size = batch_size or len(rows)
        for start in range(0, len(rows) - 1, size):
            yield buffer._get_samples(rows[start : start + size], *further)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._buffer, "get")
