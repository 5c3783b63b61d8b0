"""(h) What grows with the vocabulary, with the episodes and their length, with a reward model of another tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from speed_parts.credit_cost import fresh_process
from speed_parts.report import Finding, dtype_name
from speed_parts.rollout_clock import ClockedAgent
from speed_parts.shapes import SHAPES, Shape
from speed_parts.timing import Numbers, alternate, column, ratio_interval

VOCABULARIES = (4096, 16384, 50257)
HORIZONS, EPISODES = (32, 128, 512), (16, 64, 256)
ALIGNED = ("attention", "red")  # a row of the reward model moved to other tokens; prefixes read one by one


def measure(
    shape: Shape,
    device: torch.device,
    repetitions: int,
    vocabularies: Sequence[int] = VOCABULARIES,
    horizons: Sequence[int] = HORIZONS,
    episodes: Sequence[int] = EPISODES,
) -> list[Finding]:
    """Each size over the first one of its axis."""
    return [
        *_vocabulary(shape, vocabularies, device, repetitions),
        *_memory("horizon", {size: replace(shape, response_tokens=size) for size in horizons}, device, repetitions),
        *_memory("episodes", {size: replace(shape, episodes=size) for size in episodes}, device, repetitions),
        *_aligned(shape, device, repetitions),
    ]


def _vocabulary(shape: Shape, sizes: Sequence[int], device: torch.device, repetitions: int) -> list[Finding]:
    """Rollout (without the reference forward) and update of `PPO.learn(1)`, free score, default dtype."""
    agents = {str(size): ClockedAgent(replace(shape, vocab_size=size), "auto", device) for size in sizes}
    records = alternate({size: agent.iteration for size, agent in agents.items()}, repetitions)
    findings = []
    for size in sizes[1:]:
        for quantity, seconds in (("rollout", _rollout), ("update", _update)):
            one, base = (seconds(records[str(each)]) for each in (size, sizes[0]))
            findings.append(
                _finding(shape, f"{quantity}, vocabulary {size} / {sizes[0]}, {dtype_name('auto', device)}",
                         one, base, "s", records)
            )  # fmt: skip
    return findings


def _memory(axis: str, shapes: dict[int, Shape], device: torch.device, repetitions: int) -> list[Finding]:
    """Peak of a fresh process that makes two updates, with a reward model of the policy's size, Python included.

    A minibatch is a quarter of the episodes.
    """
    processes = {str(size): fresh_process(shape, "attention", device) for size, shape in shapes.items()}
    records = alternate(processes, max(1, repetitions - 1), warmup=0)
    first, *others = shapes
    return [
        _finding(
            shapes[size], f"peak memory, {axis} {size} / {first}",
            column(records[str(size)], "peak_bytes") / 2**20, column(records[str(first)], "peak_bytes") / 2**20,
            "MiB", records,
        )
        for size in others
    ]  # fmt: skip


def _aligned(shape: Shape, device: torch.device, repetitions: int) -> list[Finding]:
    """A whole iteration whose reward model reads the decoded text, against one that reads the ids; bundled models.

    Both have the same tokenizer and so the same lengths: what is left is decoding, encoding and moving credit.
    """
    sized = replace(
        SHAPES["bundled"], episodes=shape.episodes, response_tokens=shape.response_tokens,
        num_minibatches=shape.num_minibatches,
    )  # fmt: skip
    findings = []
    for credit in ALIGNED:
        agents = {
            name: ClockedAgent(sized, "auto", device, credit, real_reward=True, aligned=name == "aligned")
            for name in ("aligned", "own")
        }
        records = alternate({name: agent.iteration for name, agent in agents.items()}, repetitions)
        aligned, own = (column(records[name], "seconds") for name in ("aligned", "own"))
        findings.append(
            _finding(sized, f"{credit} credit, reward model aligned / own tokens", aligned, own, "s", records)
        )
    return findings


def _finding(
    shape: Shape, quantity: str, one: np.ndarray, base: np.ndarray, unit: str, records: dict[str, list[Numbers]]
) -> Finding:
    basis = f"{one.mean():.4g} / {base.mean():.4g} {unit}"
    return Finding("growth", shape.name, quantity, ratio_interval(one, base), basis, measurements=records)


def _update(records: list[Numbers]) -> np.ndarray:
    return column(records, "update_seconds")


def _rollout(records: list[Numbers]) -> np.ndarray:
    return column(records, "seconds") - column(records, "update_seconds") - column(records, "reference_seconds")
