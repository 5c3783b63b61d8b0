"""(d) Seconds of rollout per generated token, against the horizon and against the number of episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from speed_parts.report import Finding, dtype_name
from speed_parts.rollout_clock import ClockedAgent
from speed_parts.shapes import Shape
from speed_parts.timing import Numbers, alternate, column, ratio_interval

HORIZONS = (16, 32, 64, 128, 256, 512)
BATCHES = (8, 16, 32, 64, 128, 256)
BASE_HORIZON, BASE_BATCH = 32, 64
MARKED_HORIZON, MARK = 512, 2.0


def measure(
    shape: Shape,
    device: torch.device,
    repetitions: int,
    horizons: Sequence[int] = HORIZONS,
    batches: Sequence[int] = BATCHES,
) -> list[Finding]:
    """Rollouts without the reference forward, free score, default dtype; all sizes in turn.

    The horizons at the shape's number of episodes, the numbers of episodes at the shape's response length.
    """
    by_horizon = {horizon: replace(shape, response_tokens=horizon) for horizon in horizons}
    by_batch = {
        batch: replace(shape, episodes=batch, num_minibatches=min(batch, shape.num_minibatches)) for batch in batches
    }
    return [
        *_sweep("horizon", by_horizon, BASE_HORIZON, device, repetitions),
        *_sweep("episodes", by_batch, BASE_BATCH, device, repetitions),
    ]


def _sweep(axis: str, shapes: dict[int, Shape], base: int, device: torch.device, repetitions: int) -> list[Finding]:
    """Cost at each size over the cost at ``base`` (the smallest size if ``base`` is not among them)."""
    base = base if base in shapes else min(shapes)
    agents = {str(size): ClockedAgent(shape, "auto", device) for size, shape in shapes.items()}
    records = alternate({size: agent.rollout for size, agent in agents.items()}, repetitions)
    dtype = dtype_name("auto", device)
    return [
        Finding(
            "horizon", shape.name, f"cost a token, {axis} {size} / {base}, {dtype}",
            ratio_interval(_cost(records[str(size)]), _cost(records[str(base)])),
            f"{1e6 * _cost(records[str(size)]).mean():.0f} us a token",
            at_most=MARK if (axis, size) == ("horizon", MARKED_HORIZON) else None,
            measurements={"size": records[str(size)], "base": records[str(base)]},
        )
        for size, shape in shapes.items()
        if size != base
    ]  # fmt: skip


def _cost(records: list[Numbers]) -> np.ndarray:
    return column(records, "seconds") / column(records, "tokens")
