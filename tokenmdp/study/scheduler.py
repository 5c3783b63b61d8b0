"""Cells in processes side by side: a crash affects only its own cell, and what is finished is never run again."""

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

from tokenmdp.files import write_text
from tokenmdp.runs.display import ending_signals, termination_is_an_interrupt
from tokenmdp.runs.process_settings import SETTINGS
from tokenmdp.study.labels import without_directories
from tokenmdp.study.progress import Display, Progress, Worker
from tokenmdp.study.results import Cell, StudyError, cell_file, read_result

POLL_SECONDS = 0.25
GRACE_SECONDS = 5.0  # for a worker that is asked to end
STALE_SECONDS = 600.0  # a half-written file as old as this no longer has a writer
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def default_jobs(device: str) -> int:
    """One process per GPU, or one per core that this process may use.

    Raises:
        StudyError: there is no such GPU.
    """
    if device.startswith("cuda"):
        return len(gpus_of(device, os.environ))
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def gpus_of(device: str, environ: Mapping[str, str]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs of "cuda", which are all, or of one such as "cuda:1".

    Raises:
        StudyError: there is no such GPU.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    number = torch.device(device).index
    if number is None:
        return gpus
    if number >= len(gpus):
        raise StudyError(f"--device {device!r} names no GPU of the {len(gpus)} here; count from cuda:0, or use cuda")
    return [gpus[number]]


def run_cells(path: Path, cells: Sequence[Cell], *, jobs: int, device: str, console: Console) -> dict[str, str]:
    """Run those of ``cells`` that are not finished, ``jobs`` at a time.

    Args:
        path: The study, whose ``study.json`` declares the cells.
        cells: In the order in which they start.
        jobs: Processes at a time. GPUs are distributed among them.
        device: "cpu", "cuda" for all GPUs, or one such as "cuda:1".
        console: Where progress is shown: a live table on a terminal, lines in a file.

    Returns:
        id -> what went wrong, of the cells that failed; the others went on.

    Raises:
        KeyboardInterrupt: Ctrl-C, a termination request or the end of the terminal; all processes have ended and
            finished cells are kept.
        StudyError: the study was moved or deleted; all processes have ended.
    """
    progress = Progress.of(path, cells, jobs)
    slots = list(range(min(jobs, len(progress.waiting))))
    for cell in cells:
        _sweep(path, cell)
    with termination_is_an_interrupt(), Display(progress, console) as display:
        try:
            while progress.waiting or progress.running:
                while progress.waiting and slots:
                    cell = progress.waiting.pop(0)
                    if progress.finished(cell):  # by another command, meanwhile
                        display.ended(cell)
                        continue
                    with _interrupts_wait():
                        progress.running.append(_start(path, cell, slots.pop(0), device))
                time.sleep(POLL_SECONDS)
                _check_presence(path)
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


def _sweep(path: Path, cell: Cell) -> None:
    """Remove what an earlier attempt left: the trace of a crash, and of a killed process its half-written files.

    Another command may be at the same cell. Its progress file is rewritten within seconds, but the result that it
    is writing would be lost, so a half-written file has to be old.
    """
    for suffix in (".error.txt", ".progress"):
        cell_file(path, cell.id, suffix).unlink(missing_ok=True)
    for file in (path / "cells").glob(f".{cell.id}.*"):  # as `write_text` names what it has not finished
        with contextlib.suppress(FileNotFoundError):  # just finished
            if time.time() - file.stat().st_mtime > STALE_SECONDS:
                file.unlink()


def _check_presence(path: Path) -> None:
    """Cells that kept running would make a directory that no later command recognises as a study."""
    if not (path / "study.json").exists():
        raise StudyError(
            f"{path / 'study.json'} is gone, so the running cells were ended; if {path} was moved, put it back and "
            "run the same command again: finished cells stay"
        )


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """An interrupt in the block is raised at its end, when the process that was started is known and can be ended."""
    came: list[int] = []
    held = {number: signal.getsignal(number) for number in (signal.SIGINT, *ending_signals())}
    held = {number: handler for number, handler in held.items() if callable(handler)}  # not those that are ignored
    for number in held:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _start(path: Path, cell: Cell, slot: int, device: str) -> Worker:
    """A process for the cell, which a Ctrl-C in the terminal does not reach: `_end` ends it."""
    kind = device.partition(":")[0]  # in the worker there is one GPU, whatever its number here
    command = [sys.executable, "-m", "tokenmdp.study.worker", str(path), cell.id, "--device", kind]
    command += ["--parent", str(os.getpid())]
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
    """Glibc's allocator told to keep its memory, and one thread or one GPU, which slots share when there are few."""
    added = {key: value for key, value in SETTINGS.items() if key not in environ}
    if not device.startswith("cuda"):
        return {**environ, **added, **ONE_THREAD}
    gpus = gpus_of(device, environ)
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
            write_text(trace, without_directories(f"{said}\n{reason}\n" if reason not in said else f"{said}\n"))


def _ending(status: int) -> str:
    """The meaning of an exit status, in words.

    >>> _ending(-9)
    'killed by SIGKILL, which is how Linux ends a process when memory runs out'
    """
    if status >= 0:
        return f"ended with status {status} and no message"
    name = signal.Signals(-status).name
    return f"killed by {name}" + (", which is how Linux ends a process when memory runs out" if status == -9 else "")


def _end(path: Path, workers: Sequence[Worker]) -> None:
    """End processes that are still running; their cells start again next time."""
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
