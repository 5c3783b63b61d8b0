"""(a) The whole PPO iteration: rollout, scores under the reference, updates. Ours against TRL 0.11.4's PPOTrainer."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import torch

from speed_parts.report import Finding, dtype_name
from speed_parts.rollout_clock import ClockedAgent
from speed_parts.shapes import Shape
from speed_parts.timing import Numbers, Side, alternate, column, rates, ratio_interval
from speed_parts.trl_process import TRLProcess, as_it_comes

DEFAULT_MARKS = {"4x256": 2.5, "gpt2": 2.0}  # in the default dtype where that is bfloat16
FLOAT32_MARK = 1.4
CUDA_MARKS = {"4x256": 5.0, "gpt2": 3.0}


def measure(shape: Shape, device: torch.device, repetitions: int, python: Path) -> list[Finding]:
    """Both sides have the same model, batch, prompt and response lengths, epochs and minibatches, and free scores.

    Ours runs with the allocator settings that the ``tokenmdp`` command applies, TRL once as it comes, without them, and
    once with them.

    TRL computes in float32, its default; ours in float32 and in its default dtype.
    """
    dtypes = dict.fromkeys(("float32", dtype_name("auto", device)))
    sides = {dtype: ClockedAgent(shape, dtype, device) for dtype in dtypes}
    order = {
        "model": shape.model_arguments(),
        "prompt_tokens": shape.prompt_tokens,
        "response": (shape.response_tokens, shape.response_tokens),
        "ppo": {
            "batch_size": shape.episodes,
            "mini_batch_size": shape.episodes // shape.num_minibatches,
            "ppo_epochs": shape.update_epochs,
            "learning_rate": next(iter(sides.values())).agent.config.learning_rate,
        },
        "seed": 0,
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    same = dict(os.environ)
    environments = {"TRL": as_it_comes(same)}
    if environments["TRL"] != same:
        environments["TRL with our allocator settings"] = same
    with contextlib.ExitStack() as stack:
        runs = {
            name: stack.enter_context(TRLProcess(python, order, environment))
            for name, environment in environments.items()
        }
        iterations = {name: clocked(process) for name, process in runs.items()}
        records = alternate(iterations | {dtype: agent.iteration for dtype, agent in sides.items()}, repetitions)
        versions = runs["TRL"].versions
    findings = []
    for theirs in runs:
        their_rates, their_times = rates(records[theirs]), records[theirs]
        generate_share = np.mean(column(their_times, "generate_seconds") / column(their_times, "seconds"))
        for dtype in sides:
            ours = rates(records[dtype])
            update_share = np.mean(column(records[dtype], "update_seconds") / column(records[dtype], "seconds"))
            findings.append(
                Finding(
                    "trl", shape.name, f"ours {dtype} / {theirs}, float32", ratio_interval(ours, their_rates),
                    f"{ours.mean():.0f} / {their_rates.mean():.0f} response tokens/s; update share "
                    f"{update_share:.0%} / {1 - generate_share:.0%}",
                    at_least=mark(shape, dtype, device),
                    measurements={dtype: records[dtype], "trl": their_times, "trl_versions": versions},
                )
            )  # fmt: skip
    return findings


def clocked(process: TRLProcess) -> Side:
    """An iteration of TRL without what it learned, which is not the subject here."""

    def iteration() -> Numbers:
        answer = process.iteration()
        return {key: answer[key] for key in ("seconds", "generate_seconds", "tokens")}

    return iteration


def mark(shape: Shape, dtype: str, device: torch.device) -> float | None:
    """The required ratio; a float32 run on a CPU has its own mark."""
    if device.type == "cuda":
        return CUDA_MARKS.get(shape.name) if dtype == dtype_name("auto", device) else None
    if shape.name not in DEFAULT_MARKS:
        return None
    return FLOAT32_MARK if dtype == "float32" else DEFAULT_MARKS[shape.name]
