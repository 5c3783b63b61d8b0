"""One cell in a process of its own: ``python -m tokenmdp.study.worker OUT ID``.

On a CPU it computes on one thread, so that the same cell gives the same numbers whatever runs beside it, and cells
share the cores without getting into each other's way. A cell that is killed starts again from its first update.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from tokenmdp.agents.ppo import PPO, Metrics
from tokenmdp.checkpoints import write_text
from tokenmdp.commands.settings import TOY_POLICY, make_envs, resolve_device, split_prompts, toy_policy
from tokenmdp.commands.train import ppo_config
from tokenmdp.report.samples import Sample
from tokenmdp.study.grid import register
from tokenmdp.study.results import Cell, CellResult, cell_file, package_versions, read_cell, write_result
from tokenmdp.study.text_metrics import evaluate_cell

COLUMNS = (
    "update", "score_mean", "kl", "entropy", "response_length", "kl_coef", "learning_rate", "approx_kl",
    "clip_fraction", "explained_variance",
)  # fmt: skip
REPORTED = ("attention_mass", "attention_entropy", "credit_fallback")  # by some credit methods
EVALUATION_SEED = 0  # every evaluation of every cell plays the same prompts with the same noise
PROGRESS_SECONDS = 1.0  # between two writes of the progress file


class Orphaned(RuntimeError):
    """The process that started this one is gone, so nobody waits for its cell."""


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
    agent = PPO(policy, envs, ppo_config(settings, cell.updates))
    evaluations: dict[str, list[float]] = defaultdict(list)
    samples: list[Sample] = []

    def evaluate() -> None:
        nonlocal samples
        row, samples = evaluate_cell(
            agent.policy,
            agent.reference,
            settings,
            split.held_out,
            cell.gold,
            samples=cell.eval_samples,
            seed=EVALUATION_SEED,
        )
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
    return CellResult(cell, metrics, dict(evaluations), samples, time.perf_counter() - started, versions)


class ProgressFile:
    """Tells the process that waits for the cell how far it is, and stops if that one is gone."""

    def __init__(self, path: Path, updates: int) -> None:
        self.path, self.updates, self.parent = path, updates, os.getppid()
        self.started, self.written = time.monotonic(), -PROGRESS_SECONDS

    def __call__(self, metrics: Metrics) -> None:
        """After an update."""
        if os.getppid() != self.parent:
            raise Orphaned(f"process {self.parent} is gone")
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
    """Run the cell and write its result, or why there is none; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tokenmdp.study.worker", description="Run one cell of a study.")
    parser.add_argument("out", type=Path)
    parser.add_argument("id")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    device = resolve_device(arguments.device)
    if device == "cpu":
        torch.set_num_threads(1)
    cell = read_cell(arguments.out, arguments.id)
    progress = ProgressFile(cell_file(arguments.out, cell.id, ".progress"), cell.updates)
    try:
        write_result(arguments.out, run_cell(cell, device, progress))
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt | Orphaned):
            return 130  # to be run again, not a failure of the cell
        traceback.print_exc()
        with contextlib.suppress(OSError):  # the scheduler says it too
            write_text(cell_file(arguments.out, cell.id, ".error.txt"), traceback.format_exc())
        return 1
    finally:
        progress.path.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
