"""One cell in a process of its own: ``python -m tokenmdp.study.worker OUT ID``.

On a CPU it computes on one thread, so that the same cell gives the same numbers whatever else is running, and cells
share the cores without getting in each other's way. A cell that is killed starts again from its first update.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tokenmdp.agents import algorithm
from tokenmdp.agents.base import Agent, Metrics
from tokenmdp.evaluation.texts import evaluate_cell
from tokenmdp.files import write_text
from tokenmdp.report.samples import Sample
from tokenmdp.runs.environments import evaluation_envs, make_envs, resolve_device, split_prompts, toy_policy
from tokenmdp.runs.settings import TOY_POLICY, agent_config
from tokenmdp.study.directory import read_cell
from tokenmdp.study.grid import register
from tokenmdp.study.labels import without_directories
from tokenmdp.study.results import Cell, CellResult, cell_file, package_versions, write_result
from tokenmdp.training.peak_memory import peak_bytes

COLUMNS = (
    "update", "score_mean", "kl", "entropy", "response_length", "kl_coef", "learning_rate", "approx_kl",
    "clip_fraction",
)  # fmt: skip
# By algorithms with a critic, and by some credit methods:
REPORTED = ("explained_variance", "attention_mass", "attention_entropy", "credit_fallback")
EVALUATION_SEED = 0  # every evaluation of every cell plays the same prompts with the same noise
PROGRESS_SECONDS = 1.0  # between two writes of the progress file
RESULT_BYTES = 30_000  # more than a finished cell of 150 updates takes


class Orphaned(RuntimeError):
    """The cell is no longer wanted: the process that started this one is gone, or the study is."""


def run_cell(cell: Cell, device: str = "cpu", progress: Callable[[Metrics], None] | None = None) -> CellResult:
    """Train and evaluate one cell.

    Args:
        cell: What to run.
        device: "cpu", "cuda" or "cuda:1".
        progress: Called with the metrics of every update; may raise to stop.
    """
    started = time.perf_counter()
    register(cell.settings.credit)
    settings = replace(cell.settings, device=device)
    split = split_prompts(settings)
    envs = make_envs(settings, settings.num_envs, split.training)
    policy = toy_policy(settings.seed) if settings.policy == TOY_POLICY else settings.policy
    kind: Any = algorithm(settings.algorithm)
    agent: Agent = kind(policy, envs, agent_config(settings, cell.updates))
    evaluations: dict[str, list[float]] = defaultdict(list)
    samples: list[Sample] = []

    def evaluate() -> None:
        nonlocal samples
        held_out = evaluation_envs(settings, cell.eval_samples, split.held_out)
        row, samples = evaluate_cell(
            agent.policy, agent.reference, held_out, cell.gold, samples=cell.eval_samples, seed=EVALUATION_SEED
        )
        held_out.close()
        for name, value in ({"update": agent.num_updates_done} | row).items():
            evaluations[name].append(value)

    def after_update(metrics: Metrics) -> None:
        if progress is not None:
            progress(metrics)
        if agent.num_updates_done % cell.eval_every == 0 or agent.num_updates_done == cell.updates:
            evaluate()

    evaluate()
    agent.learn(cell.updates, callback=after_update)
    envs.close()
    columns = (*COLUMNS, *(name for name in REPORTED if name in agent.history[0]))
    metrics = {name: [record[name] for record in agent.history] for name in columns}
    versions = package_versions() | {"device": device, "dtype": str(agent.policy.compute_dtype)}
    seconds = time.perf_counter() - started
    return CellResult(cell, metrics, dict(evaluations), samples, seconds, versions, costs_of(agent))


def costs_of(agent: Agent) -> dict[str, float]:
    """Training costs: medians over the updates, the first of which warms up, and the peak of the whole process."""
    return {
        "update_seconds": statistics.median(record["seconds"] for record in agent.history),
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in agent.history),  # of responses
        "peak_bytes": peak_bytes(agent.policy.lm.device),  # evaluations included
    }


class ProgressFile:
    """Reports progress to the process that waits for the cell, and stops if that process, or the study, is gone."""

    def __init__(self, out: Path, cell: Cell, parent: int) -> None:
        self.out, self.path, self.updates, self.parent = out, cell_file(out, cell.id, ".progress"), cell.updates, parent
        self.started, self.written = time.monotonic(), -PROGRESS_SECONDS

    def check(self) -> None:
        """Whether the result is still wanted.

        Raises:
            Orphaned: it is not.
        """
        if sys.platform != "win32" and os.getppid() != self.parent:  # a launcher stands between them on Windows
            raise Orphaned(f"process {self.parent} is gone")
        if not (self.out / "study.json").exists():  # writing would make a directory that is not a study
            raise Orphaned(f"{self.out} is gone")

    def begin(self) -> None:
        """Write a file as large as the result will be.

        Raises:
            OSError: a full disk, for example, which should be noticed before the cell has used its time.
        """
        self.check()
        write_text(self.path, "{}" + " " * RESULT_BYTES)

    def __call__(self, metrics: Metrics) -> None:
        """After an update."""
        self.check()
        now = time.monotonic()
        if now - self.written < PROGRESS_SECONDS:
            return
        self.written = now
        record = {
            "update": metrics["update"],
            "updates": self.updates,
            "score": metrics["score_mean"],
            "kl": metrics["kl"],
            "seconds": round(now - self.started, 1),
        }
        with contextlib.suppress(OSError):  # a full disk: what matters is whether the result can be written
            write_text(self.path, json.dumps(record))


def main(argv: list[str] | None = None) -> int:
    """Run the cell and write its result, or why there is none; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tokenmdp.study.worker", description="Run one cell of a study.")
    parser.add_argument("out", type=Path)
    parser.add_argument("id")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parent", type=int, default=os.getppid(), help="stop when this process is gone")
    arguments = parser.parse_args(argv)
    device = resolve_device(arguments.device)
    if device == "cpu":
        torch.set_num_threads(1)
    cell = read_cell(arguments.out, arguments.id)
    progress = ProgressFile(arguments.out, cell, arguments.parent)
    try:
        progress.begin()
        result = run_cell(cell, device, progress)
        progress.check()
        write_result(arguments.out, result)
    except KeyboardInterrupt:
        return 130  # to be run again, not a failure of the cell
    except Orphaned as error:
        print(f"{cell.id} was stopped: {error}", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        with contextlib.suppress(OSError):  # the scheduler says it too
            trace = without_directories(traceback.format_exc())
            write_text(cell_file(arguments.out, cell.id, ".error.txt"), trace)
        return 1
    finally:
        progress.path.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
