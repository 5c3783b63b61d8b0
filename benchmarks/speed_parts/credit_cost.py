"""(c) The cost of attention credit beside sparse credit: time of a whole iteration, and peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from speed_parts import peak_memory
from speed_parts.report import Finding
from speed_parts.rollout_clock import ClockedAgent
from speed_parts.shapes import Shape
from speed_parts.timing import Numbers, Side, alternate, column, ratio_interval

CREDITS = ("sparse", "attention")  # without and with the row captured
LENGTHS = (24, 150)
TIME_MARK, MEMORY_MARK = 1.02, 1.01
UPDATES = 2  # of a process whose memory is measured: the second meets the optimizer's state and a used allocator


def measure(shape: Shape, device: torch.device, repetitions: int, lengths: Sequence[int] = LENGTHS) -> list[Finding]:
    """Policy and reward model of the shape, default dtype; every response has the same length, so tokens are equal.

    Time: two agents in one process, in turn. Memory: a fresh process for each repetition and credit, in turn.
    """
    findings = []
    for length in lengths:
        sized = replace(shape, response_tokens=length)
        iterations = {
            credit: ClockedAgent(sized, "auto", device, credit, real_reward=True).iteration for credit in CREDITS
        }
        records = alternate(iterations, repetitions)
        findings.append(finding(sized, "time", "seconds", records, TIME_MARK, 1.0, "s"))
        del iterations
        processes = {credit: fresh_process(sized, credit, device) for credit in CREDITS}
        records = alternate(processes, max(1, repetitions // 2), warmup=0)
        findings.append(finding(sized, "peak memory", "peak_bytes", records, MEMORY_MARK, 1 / 2**20, "MiB"))
    return findings


def finding(
    shape: Shape, quantity: str, key: str, records: dict[str, list[Numbers]], mark: float, scale: float, unit: str
) -> Finding:
    """Attention over sparse, for one column of the records."""
    sparse, attention = (column(records[credit], key) for credit in CREDITS)
    tokens = {int(count) for credit in CREDITS for count in column(records[credit], "tokens")}
    assert tokens == {shape.tokens}, f"response tokens {tokens}; {shape.tokens} were asked for"
    return Finding(
        "credit", shape.name, f"attention / sparse, {quantity}, {shape.response_tokens} tokens",
        ratio_interval(attention, sparse),
        f"{scale * attention.mean():.4g} / {scale * sparse.mean():.4g} {unit}; {shape.tokens} response tokens each",
        at_most=mark, measurements=records,
    )  # fmt: skip


def fresh_process(shape: Shape, credit: str, device: torch.device) -> Side:
    """`peak_memory` in a process of its own, which inherits the allocator settings."""
    order = {"shape": shape.to_json(), "credit": credit, "device": str(device), "updates": UPDATES}
    order["threads"] = torch.get_num_threads()
    found = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    command = [sys.executable, "-P", "-m", peak_memory.__name__, json.dumps(order)]  # -P: not the cwd first

    def run() -> Numbers:
        output = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": found}, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        return json.loads(output.splitlines()[-1])

    return run
