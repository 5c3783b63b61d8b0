"""The findings: a table for people and JSON for programs."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tokenmdp.files import write_text
from tokenmdp.intervals import Estimate
from tokenmdp.models.precision import resolve_dtype
from tokenmdp.runs.process_settings import SETTINGS, describe
from tokenmdp.wording import count

WIDTH = 160  # columns of a table that goes to a file
PACKAGES = ("torch", "transformers", "gymnasium", "numpy")


@dataclass(frozen=True)
class Finding:
    """One number with its interval over repetitions, and the mark it is held against."""

    part: str
    shape: str
    quantity: str  # such as "ours / TRL, float32"
    interval: Estimate
    basis: str  # the numbers behind it, for the table
    at_least: float | None = None
    at_most: float | None = None
    percent: bool = False  # print as a percentage
    measurements: dict[str, Any] = field(default_factory=dict)  # every repetition

    @property
    def met(self) -> bool | None:
        """Whether the measured number is on the right side of the mark; None: there is no mark.

        >>> Finding("flops", "gpt2", "rate", Estimate(0.6, 0.5, 0.7), "", at_least=0.5).met
        True
        """
        if self.at_least is not None:
            return self.interval.value >= self.at_least
        return None if self.at_most is None else self.interval.value <= self.at_most

    @property
    def mark(self) -> str:
        """Such as ">= 2.500"; empty without one."""
        if self.at_least is not None:
            return f">= {self._print(self.at_least)}"
        return "" if self.at_most is None else f"<= {self._print(self.at_most)}"

    @property
    def verdict(self) -> str:
        """Such as "met"; "open" is added where the interval holds the mark."""
        if self.met is None:
            return ""
        mark = self.at_most if self.at_least is None else self.at_least
        certain = not self.interval.low <= mark <= self.interval.high
        return ("met" if self.met else "not met") + ("" if certain else ", interval open")

    @property
    def measured(self) -> str:
        """The number with its interval."""
        mean, low, high = map(self._print, self.interval)
        return f"{mean} [{low}, {high}]" if math.isfinite(self.interval.high) else mean

    def _print(self, number: float) -> str:
        return f"{100 * number:.2f}%" if self.percent else f"{number:.3f}"

    def without_mark(self) -> Finding:
        """The number alone.

        >>> Finding("flops", "gpt2", "rate", Estimate(0.4, 0.3, 0.5), "", at_least=0.5).without_mark().verdict
        ''
        """
        return replace(self, at_least=None, at_most=None)

    def to_json(self) -> dict[str, Any]:
        """Infinite bounds (one repetition) become null."""
        bounds = [bound if math.isfinite(bound) else None for bound in self.interval[1:]]
        return {
            "part": self.part, "shape": self.shape, "quantity": self.quantity, "value": self.interval.value,
            "interval": bounds, "basis": self.basis, "at_least": self.at_least, "at_most": self.at_most,
            "met": self.met, "verdict": self.verdict, "measurements": self.measurements,
        }  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """Versions, processor and settings of this process."""
    described = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "default_dtype": dtype_name("auto", device),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "allocator": {key: os.environ[key] for key in SETTINGS if key in os.environ},
        "load_average": list(os.getloadavg()),
    }
    return described


def cpu_name() -> str:
    """The processor as it names itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    families = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("cpu family", "model\t"))][:2]
    return f"{names[0]} (family {'/'.join(families)})" if names else platform.machine()


def dtype_name(dtype: str, device: torch.device) -> str:
    """The dtype that a `PPOConfig.dtype` means here.

    >>> dtype_name("float32", torch.device("cpu"))
    'float32'
    """
    return str(resolve_dtype(dtype, device)).removeprefix("torch.")


def print_table(findings: list[Finding], described: dict[str, Any]) -> None:
    """One line per finding, under a line about the machine."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(
        f"{described['cpu']}, {count(described['threads'], 'thread')} of {count(described['cores'], 'core')}, device "
        f"{described['device']}, default dtype {described['default_dtype']}, torch {described['torch']}, transformers "
        f"{described['transformers']}, load {described['load_average'][0]:.1f}",
        soft_wrap=True,
    )
    console.print(describe(os.environ), soft_wrap=True)
    table = Table(title="95% intervals over repetitions")
    for name in ("part", "shape", "quantity", "measured", "must show", "verdict", "basis"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        table.add_row(
            finding.part, finding.shape, finding.quantity, finding.measured, finding.mark, finding.verdict,
            finding.basis,
        )  # fmt: skip
    console.print(table)


def write_json(path: Path, findings: list[Finding], described: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Replace ``path`` in one go; called after each part, so that an interrupted run keeps what it has."""
    report = {
        "machine": described,
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in arguments.items()},
        "findings": [finding.to_json() for finding in findings],
    }
    write_text(path, json.dumps(report, indent=1) + "\n")
