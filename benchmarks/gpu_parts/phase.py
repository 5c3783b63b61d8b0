"""One phase in a process of its own: what it is given, and the file that it writes after each finding."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from speed_parts.shapes import SHAPES, Shape
from speed_parts.timing import now

from tokenmdp.files import write_text

REPETITIONS = 5
WAYS = (  # dtype, float32 products ("high": TF32), rollout_steps
    ("float32", "highest", "plain"), ("float32", "high", "plain"), ("float32", "high", "recorded"),
    ("bfloat16", "highest", "plain"), ("bfloat16", "highest", "copied"), ("bfloat16", "highest", "recorded"),
)  # fmt: skip


@dataclass
class Phase:
    """What a phase works on, and what it has found.

    Attributes:
        path: its JSON file.
        device: cpu or cuda.
        smoke: tiny sizes, once.
        found: by name; written after each.
    """

    path: Path
    device: torch.device
    smoke: bool
    found: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def add(self, name: str, finding: Any) -> None:
        """Add a finding and write all so far."""
        self.found[name] = finding
        seconds = round(time.perf_counter() - self.started, 1)
        write_text(self.path, json.dumps({"seconds": seconds, "found": self.found}, indent=1))

    def attempt(self, name: str, work: Callable[[], Any]) -> None:
        """Add what ``work`` returns, or how it fails: the other findings do not depend on it."""
        try:
            self.add(name, work())
        except Exception:
            self.add(name, {"error": traceback.format_exc()[-3000:]})

    @property
    def shapes(self) -> list[Shape]:
        """The sizes that are measured."""
        return [SHAPES["smoke"]] if self.smoke else [SHAPES["4x256"], SHAPES["gpt2-64"]]

    def median_seconds(self, work: Callable[[], Any], warmups: int = 2) -> float:
        """Of some repetitions, after those that are not counted."""
        for _ in range(1 if self.smoke else warmups):
            work()
        seconds = []
        for _ in range(1 if self.smoke else REPETITIONS):
            start = now(self.device)
            work()
            seconds.append(now(self.device) - start)
        return sorted(seconds)[len(seconds) // 2]
