"""Clocks, runs that alternate, and ratios with intervals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv

from tokenmdp.intervals import Estimate, mean_interval
from tokenmdp.reward_models import RewardModel
from tokenmdp.types import Episode, RewardOutput

Numbers = dict[str, float]
Side = Callable[[], Numbers]


def now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    wait_for(device)
    return time.perf_counter()


def wait_for(device: torch.device | str) -> None:
    """Until a GPU has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Adds up the time inside ``with watch:`` blocks.

    Attributes:
        seconds: so far.
        stopped_at: the clock when the last block ended.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.stopped_at = device, 0.0, 0.0

    def __enter__(self) -> Stopwatch:
        self._start = now(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped_at = now(self.device)
        self.seconds += self.stopped_at - self._start

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return timed

    def take(self) -> float:
        """The seconds so far, and start again from 0."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class TimedEnvs(gym.vector.VectorWrapper):
    """Environments, credit wrapper and reward model together, with a watch on reset and step."""

    def __init__(self, envs: VectorEnv, watch: Stopwatch) -> None:
        super().__init__(envs)
        self.watch = watch

    def reset(self, **arguments: Any) -> Any:
        """As the wrapped environments, timed."""
        with self.watch:
            return self.env.reset(**arguments)

    def step(self, actions: Any) -> Any:
        """As the wrapped environments, timed."""
        with self.watch:
            return self.env.step(actions)


class TimedReward(RewardModel):
    """Another reward model with a watch on its own work: what it computes, not the checks around it."""

    def __init__(self, inner: RewardModel, watch: Stopwatch) -> None:
        super().__init__(inner.tokenizer)
        self.inner, self.watch = inner, watch
        self.provides, self.max_tokens = inner.provides, inner.max_tokens

    def evaluate(self, episodes: Episode, needs: frozenset[str]) -> RewardOutput:
        """Its own evaluation, timed."""
        with self.watch:
            return self.inner.evaluate(episodes, needs)


def alternate(sides: Mapping[str, Side], repetitions: int, warmup: int = 1) -> dict[str, list[Numbers]]:
    """Run every side once per repetition, in turn; every second repetition reverses the order.

    A machine that slows down then slows all sides alike. The first ``warmup`` repetitions are not counted.
    """
    records: dict[str, list[Numbers]] = {name: [] for name in sides}
    for repetition in range(warmup + repetitions):
        order = list(sides) if repetition % 2 == 0 else list(sides)[::-1]
        for name in order:
            numbers = sides[name]()
            if repetition >= warmup:
                records[name].append(numbers)
    return records


def column(records: Sequence[Numbers], key: str) -> np.ndarray:
    """One number of every repetition, (R,)."""
    return np.array([numbers[key] for numbers in records])


def rates(records: Sequence[Numbers]) -> np.ndarray:
    """Tokens per second of every repetition, (R,)."""
    return column(records, "tokens") / column(records, "seconds")


def ratio_interval(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray) -> Estimate:
    """``exp(mean(log(a[r] / b[r])))`` over repetitions r with its 95% interval (Student's t, on the logarithms).

    Repetition r of both sides ran one after the other, so the pairs share what slowed the machine. Logarithms, so that
    a / b and b / a agree.

    >>> round(ratio_interval([2.0, 8.0], [1.0, 2.0]).value, 3)
    2.828
    """
    logs = mean_interval(np.log(np.asarray(numerators, float) / np.asarray(denominators, float)))
    return Estimate(*(math.exp(bound) if bound < 700 else math.inf for bound in logs))
