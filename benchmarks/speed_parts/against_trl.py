"""(a) The whole PPO iteration: rollout, scores under the reference, updates. Ours against TRL 0.11.4's PPOTrainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from speed_parts.report import Finding, dtype_name
from speed_parts.rollout_clock import ClockedAgent
from speed_parts.shapes import Shape
from speed_parts.timing import alternate, column, rates, ratio_interval
from speed_parts.trl_process import TRLProcess, make_environment

DEFAULT_MARKS = {"4x256": 2.5, "gpt2": 2.0}  # in the default dtype where that is bfloat16
FLOAT32_MARK = 1.4
CUDA_MARKS = {"4x256": 5.0, "gpt2": 3.0}


def measure(shape: Shape, device: torch.device, repetitions: int, directory: Path) -> list[Finding]:
    """Both sides have the same model, batch, prompt and response lengths, epochs and minibatches, and free scores.

    TRL computes in float32, its default; ours in float32 and in its default dtype.
    """
    dtypes = dict.fromkeys(("float32", dtype_name("auto", device)))
    sides = {dtype: ClockedAgent(shape, dtype, device) for dtype in dtypes}
    order = {
        "model": shape.model_arguments(),
        "episodes": shape.episodes,
        "prompt_tokens": shape.prompt_tokens,
        "response_tokens": shape.response_tokens,
        "minibatch": shape.episodes // shape.num_minibatches,
        "update_epochs": shape.update_epochs,
        "learning_rate": next(iter(sides.values())).agent.config.learning_rate,
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    with TRLProcess(make_environment(directory), order) as trl:
        runs = {"trl": trl.iteration} | {dtype: agent.iteration for dtype, agent in sides.items()}
        records = alternate(runs, repetitions)
        versions = trl.versions
    theirs = rates(records["trl"])
    generate_share = np.mean(column(records["trl"], "generate_seconds") / column(records["trl"], "seconds"))
    findings = []
    for dtype in sides:
        ours = rates(records[dtype])
        update_share = np.mean(column(records[dtype], "update_seconds") / column(records[dtype], "seconds"))
        findings.append(
            Finding(
                "trl", shape.name, f"ours {dtype} / TRL float32, whole iteration", ratio_interval(ours, theirs),
                f"{ours.mean():.0f} / {theirs.mean():.0f} response tokens/s; update share {update_share:.0%} / "
                f"{1 - generate_share:.0%}",
                at_least=mark(shape, dtype, device),
                measurements={dtype: records[dtype], "trl": records["trl"], "trl_versions": versions},
            )
        )  # fmt: skip
    return findings


def mark(shape: Shape, dtype: str, device: torch.device) -> float | None:
    """What the ratio must be; a float32 run on a CPU has a mark of its own."""
    if device.type == "cuda":
        return CUDA_MARKS.get(shape.name) if dtype == dtype_name("auto", device) else None
    if shape.name not in DEFAULT_MARKS:
        return None
    return FLOAT32_MARK if dtype == "float32" else DEFAULT_MARKS[shape.name]
