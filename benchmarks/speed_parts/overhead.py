"""(e) The share of environments and credit wrapper in the rollout, beside the policy and the reward model."""

from __future__ import annotations

import numpy as np
import torch

from speed_parts.report import Finding, dtype_name
from speed_parts.rollout_clock import ClockedAgent
from speed_parts.shapes import Shape
from speed_parts.timing import alternate, column
from tokenmdp.intervals import mean_interval

MARK = 0.05


def measure(shape: Shape, device: torch.device, repetitions: int) -> list[Finding]:
    """``(reset + steps - reward) / (rollout - reward)``; reward is the reward model's ``evaluate`` alone.

    A reward model of the policy's size, attention credit. The reward model's time is taken off below the line as well,
    which makes the share larger than "of the whole rollout" would.
    """
    sides = {
        dtype: ClockedAgent(shape, dtype, device, credit="attention", real_reward=True).rollout
        for dtype in dict.fromkeys((dtype_name("auto", device), "float32"))
    }
    findings = []
    for dtype, records in alternate(sides, repetitions).items():
        reward, whole = column(records, "reward_seconds"), column(records, "seconds")
        own = column(records, "envs_seconds") - reward
        findings.append(
            Finding(
                "overhead", shape.name, f"environments and wrapper / rollout, {dtype}",
                mean_interval(own / (whole - reward)),
                f"{1000 * np.mean(own):.1f} ms of {1000 * np.mean(whole - reward):.0f} ms; reward model "
                f"{1000 * np.mean(reward):.0f} ms",
                at_most=MARK, percent=True, measurements={dtype: records},
            )
        )  # fmt: skip
    return findings
