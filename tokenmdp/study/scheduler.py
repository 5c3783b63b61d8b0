"""Cells in processes side by side: each crash stays its own, and what is finished is never run again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from tokenmdp.checkpoints import write_text
from tokenmdp.commands.allocator import SETTINGS
from tokenmdp.study.progress import Progress, Worker, display_of
from tokenmdp.study.results import Cell, StudyError, cell_file, read_result

POLL_SECONDS = 0.25
GRACE_SECONDS = 5.0  # for a worker that is asked to end
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def default_jobs(device: str) -> int:
    """A process a GPU, or a process a core that this one may use."""
    if device.startswith("cuda"):
        return max(1, torch.cuda.device_count())
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def run_cells(path: Path, cells: Sequence[Cell], *, jobs: int, device: str, console: Console) -> dict[str, str]:
    """Run those of ``cells`` that are not finished, ``jobs`` at a time.

    Args:
        path: The study, whose ``study.json`` declares the cells.
        cells: In the order in which they start.
        jobs: Processes at a time. GPUs are shared out among them.
        device: "cpu" or "cuda".
        console: Where progress is shown: a live table on a terminal, lines in a file.

    Returns:
        id -> what went wrong, of the cells that failed; the others went on.

    Raises:
        KeyboardInterrupt: Ctrl-C or a termination request; all processes have ended and finished cells are kept.
    """
    progress = Progress.of(path, cells, jobs)
    slots = list(range(min(jobs, len(progress.waiting))))
    with _termination_is_an_interrupt(), display_of(progress, console) as display:
        try:
            while progress.waiting or progress.running:
                while progress.waiting and slots:
                    cell = progress.waiting.pop(0)
                    cell_file(path, cell.id, ".error.txt").unlink(missing_ok=True)
                    progress.running.append(_start(path, cell, slots.pop(0), device))
                time.sleep(POLL_SECONDS)
                for worker in [worker for worker in progress.running if worker.process.poll() is not None]:
                    progress.running.remove(worker)
                    slots.append(worker.slot)
                    _record(progress, worker)
                    display.ended(worker.cell)
                for worker in progress.running:
                    worker.look(path)
                display.show()
        finally:
            _end(path, progress.running)
    return progress.errors


@contextlib.contextmanager
def _termination_is_an_interrupt() -> Iterator[None]:
    """A batch system's request to end is handled as Ctrl-C."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _start(path: Path, cell: Cell, slot: int, device: str) -> Worker:
    """A process for the cell, which a Ctrl-C in the terminal does not reach: `_end` ends it."""
    command = [sys.executable, "-m", "tokenmdp.study.worker", str(path), cell.id, "--device", device]
    stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the process has ended)
    process = subprocess.Popen(
        command,
        env=_environment(os.environ, slot, device),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        start_new_session=True,
    )
    return Worker(cell, process, slot, stderr)


def _environment(environ: Mapping[str, str], slot: int, device: str) -> dict[str, str]:
    """One thread and glibc's allocator told to keep its memory; on GPUs the slot's own one."""
    added = {key: value for key, value in SETTINGS.items() if key not in environ}
    if device == "cpu":
        return {**environ, **added, **ONE_THREAD}
    visible = environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = visible.split(",")
    return {**environ, **added, "CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}


def _record(progress: Progress, worker: Worker) -> None:
    """Count a process that ended as a finished cell or as a failed one, whose reason is kept in its error file."""
    path, cell, status = progress.path, worker.cell, worker.process.returncode
    worker.stderr.seek(0)
    said = worker.stderr.read().decode(errors="replace").strip()
    worker.stderr.close()
    try:
        if status == 0:
            read_result(path, cell.id)
            progress.add(cell, worker.elapsed)
            return
    except StudyError as error:
        said, status = f"{said}\n{error}", 1
    reason = said.splitlines()[-1] if said and status > 0 else _ending(status)
    progress.errors[cell.id] = reason
    trace = cell_file(path, cell.id, ".error.txt")
    with contextlib.suppress(OSError):  # a full disk; the reason is shown in any case
        cell_file(path, cell.id, ".progress").unlink(missing_ok=True)
        if not trace.exists():
            write_text(trace, f"{said}\n{reason}\n" if reason not in said else f"{said}\n")


def _ending(status: int) -> str:
    """What an exit status says.

    >>> _ending(-9)
    'killed by SIGKILL, which is how Linux ends a process when memory runs out'
    """
    if status >= 0:
        return f"ended with status {status} and no message"
    name = signal.Signals(-status).name
    return f"killed by {name}" + (", which is how Linux ends a process when memory runs out" if status == -9 else "")


def _end(path: Path, workers: Sequence[Worker]) -> None:
    """End processes that still run; their cells start again another time."""
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        try:
            worker.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
        worker.stderr.close()
        cell_file(path, worker.cell.id, ".progress").unlink(missing_ok=True)
