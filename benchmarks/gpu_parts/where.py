"""What the machine is, and where the time of an update goes on it: kernels, launches, lines at which the host waits."""

from __future__ import annotations

import collections
import platform
import warnings
from pathlib import Path
from typing import Any

import torch
from speed_parts.device_profile import LAUNCHES, own_time, profiled
from speed_parts.report import machine
from speed_parts.shapes import Shape, make_agent, make_envs
from speed_parts.timing import now

import tokenmdp
from gpu_parts.phase import Phase

ROOT = Path(tokenmdp.__file__).parents[1]
MOST = 20  # rows of a table


def described(phase: Phase) -> None:
    """Versions, the device, and whether it computes."""
    phase.add("machine", machine(phase.device) | {"python": platform.python_version(), "cuda": torch.version.cuda})
    if phase.device.type == "cuda":
        facts = torch.cuda.get_device_properties(phase.device)
        phase.add(
            "device", {"name": facts.name, "GiB": facts.total_memory / 2**30, "capability": [facts.major, facts.minor]}
        )
    phase.attempt(
        "a product",
        lambda: (torch.ones(4, 4, device=phase.device) @ torch.ones(4, 4, device=phase.device))[0, 0].item(),
    )


def profile(phase: Phase) -> None:
    """One update of each shape under PyTorch's profiler, and one in which every wait for the device is a warning."""
    for shape in phase.shapes:
        for dtype in ("float32", "bfloat16"):
            phase.attempt(f"{shape.name} {dtype}", lambda s=shape, d=dtype: _profile(phase, s, d))


def _profile(phase: Phase, shape: Shape, dtype: str) -> dict[str, Any]:
    device = str(phase.device)
    agent = make_agent(shape, make_envs(shape), dtype, device)
    agent.learn(1 if phase.smoke else 2)
    start = now(phase.device)
    rows = profiled(lambda: agent.learn(1), device).key_averages()
    seconds = now(phase.device) - start
    by_time = sorted(rows, key=lambda row: -own_time(row, device))
    by_host = sorted(rows, key=lambda row: -row.self_cpu_time_total)
    return {
        "seconds_profiled": seconds,
        "device_busy_seconds": sum(own_time(row, device) for row in rows) / 1e6,
        "launches": sum(row.count for row in rows if row.key in LAUNCHES),
        "calls": {row.key: row.count for row in rows if row.key.startswith("cuda")},
        "kernels": [(row.key[:80], row.count, own_time(row, device) / 1e3) for row in by_time[:MOST]],
        "host": [(row.key[:80], row.count, row.self_cpu_time_total / 1e3) for row in by_host[:MOST]],
        "waits": waits(agent) if phase.device.type == "cuda" else None,
    }


def waits(agent: Any) -> list[tuple[str, int]]:
    """The lines at which the host waited for the device in one update, and how often."""
    places: collections.Counter[str] = collections.Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, file, line, *rest: places.update([f"{file}:{line}"])
        torch.cuda.set_sync_debug_mode("warn")
        try:
            agent.learn(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [
        (place.removeprefix(f"{ROOT}/").split("site-packages/")[-1], times) for place, times in places.most_common()
    ]
