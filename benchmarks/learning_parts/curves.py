"""``curves``: every run in a process of its own, some side by side; what is finished is not run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from speed_parts.report import machine

from learning_parts.engines import opened
from learning_parts.protocol import Run, run_from
from learning_parts.results import CurveResult, curve_file, read_curve, unfinished_curves

PROGRAM = Path(__file__).resolve().parents[1] / "learning.py"
POLL_SECONDS = 1.0


def run_all(runs: Sequence[Run], out: Path, jobs: int, trl_venv: Path, console: Console) -> list[str]:
    """Run those of ``runs`` that are not finished, ``jobs`` at a time; the names of those that failed.

    A run that was interrupted starts again from its first update. What a failed run printed stays in its ``.log``.
    """
    waiting, failed = unfinished_curves(out, runs), []
    for run in runs:
        if run not in waiting:
            console.print(f"{run.name} is finished already", markup=False)
    running: dict[subprocess.Popen[bytes], tuple[Run, TaskID]] = {}
    with _progress(console) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    curve_file(out, run).unlink(missing_ok=True)
                    task = progress.add_task(run.name, total=run.protocol.updates, numbers="")
                    running[_start(run, out, trl_venv)] = run, task
                time.sleep(POLL_SECONDS)
                for process, (run, task) in list(running.items()):
                    ended = process.poll()  # before the file is read: a run that has ended is then read whole
                    _show(progress, task, run, out)
                    if ended is None:
                        continue
                    del running[process]
                    log = _log_file(out, run)
                    if ended:
                        failed.append(run.name)
                        lines = log.read_text(errors="replace").strip().splitlines()
                        said = lines[-1] if lines else "it printed nothing"
                        console.print(f"{run.name} failed with {ended}: {said} ({log})", markup=False)
                    else:
                        log.unlink()
                        console.print(f"{run.name} is finished", markup=False)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
    return failed


def run_one(order: dict[str, Any]) -> None:
    """The process of one run: make all updates and keep them in the run's file after each."""
    run, out = run_from(order["run"]), Path(order["out"])
    torch.set_num_threads(run.protocol.threads)
    with opened(run, Path(order["trl_venv"])) as (update, versions):
        result = CurveResult(run, machine(torch.device("cpu")) | {"trl_versions": versions})
        while not result.finished:
            result.records.append(update())
            result.write(out)


def _start(run: Run, out: Path, trl_venv: Path) -> subprocess.Popen[bytes]:
    order = {"run": run.to_json(), "out": str(out), "trl_venv": str(trl_venv)}
    log = _log_file(out, run)
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = str(run.protocol.threads)
    environ = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    command = [
        sys.executable,
        str(PROGRAM),
        "run",
        json.dumps(order),
        "--no-reexec",
    ]  # the settings are in environ already
    with log.open("wb") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, env=environ)


def _log_file(out: Path, run: Run) -> Path:
    return curve_file(out, run).with_suffix(".log")


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[numbers]}"), console=console) as progress:
        yield progress


def _show(progress: Progress, task: TaskID, run: Run, out: Path) -> None:
    if curve_file(out, run).exists() and (records := read_curve(curve_file(out, run)).records):
        last = records[-1]
        numbers = f"score {last['score']:.2f}  KL {last['kl']:.2f}  {last['seconds']:.1f} s per update"
        progress.update(task, completed=len(records), numbers=numbers)
