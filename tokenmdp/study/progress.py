"""The progress of a run of many cells, and its display: a live table on a terminal, lines in a file."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tokenmdp.study.grid import load_cost
from tokenmdp.study.results import Cell, cell_file, read_result
from tokenmdp.wording import clock

TELLING_SHARE = 0.2  # of a cell, after which its own pace tells how long it takes
LINE_SECONDS = 60.0  # between two lines about running cells where the output is a file


@dataclass
class Worker:
    """A running process and its cell."""

    cell: Cell
    process: subprocess.Popen[bytes]
    slot: int
    stderr: IO[bytes]
    started: float = field(default_factory=time.monotonic)
    seen: dict[str, Any] = field(default_factory=dict)  # its progress file

    def look(self, path: Path) -> None:
        """Read the progress file, if there is one."""
        with contextlib.suppress(OSError, ValueError):
            self.seen = json.loads(cell_file(path, self.cell.id, ".progress").read_text(encoding="utf-8"))

    @property
    def share(self) -> float:
        """How much of the cell is done, 0 to 1."""
        return self.seen.get("update", 0) / self.cell.updates

    @property
    def elapsed(self) -> float:
        """Seconds."""
        return time.monotonic() - self.started

    def seconds_left(self, expected: float) -> float:
        """Estimated from its own pace once that is known, before from the time expected for the whole cell."""
        if self.share < TELLING_SHARE:
            return max(0.0, expected - self.elapsed)
        return self.elapsed * (1 - self.share) / self.share


@dataclass
class Progress:
    """The progress of a run of many cells."""

    path: Path
    jobs: int
    total: int
    waiting: list[Cell]
    running: list[Worker] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)  # credit method -> seconds per unit of cost
    done: int = 0

    @classmethod
    def of(cls, path: Path, cells: Sequence[Cell], jobs: int) -> Progress:
        """The initial state: finished cells count, and show how long others take."""
        progress = cls(path, jobs, len(cells), [])
        progress.waiting = [cell for cell in cells if not progress.finished(cell)]
        return progress

    def finished(self, cell: Cell) -> bool:
        """Whether the cell has its result; if so, it is counted."""
        if not cell_file(self.path, cell.id).exists():
            return False
        self.add(cell, read_result(self.path, cell.id).seconds)
        return True

    def add(self, cell: Cell, seconds: float) -> None:
        """Count a finished cell and what it took."""
        self.done += 1
        self.rates.setdefault(cell.settings.credit, []).append(seconds / load_cost(cell))

    def seconds_left(self) -> float | None:
        """An estimate; None while there is nothing to base it on.

        Waiting cells are taken to be as fast as finished ones, those of the same method first, and so are running ones
        until their own pace can be told.
        """
        known = [rate for rates in self.rates.values() for rate in rates]
        known = known or [
            worker.elapsed / worker.share / load_cost(worker.cell) for worker in self.running if worker.share
        ]
        if not known:
            return None

        def seconds(cell: Cell) -> float:
            rates = self.rates.get(cell.settings.credit, known)
            return load_cost(cell) * sum(rates) / len(rates)

        ending = [worker.seconds_left(seconds(worker.cell)) for worker in self.running]
        return max([(sum(ending) + sum(map(seconds, self.waiting))) / self.jobs, *ending])

    def __str__(self) -> str:
        """Such as ``12 of 60 cells done, 1 failed, about 4:10 left``."""
        left = self.seconds_left() if self.waiting or self.running else None
        parts = [f"{self.done} of {self.total} cells done"]
        parts += [f"{len(self.errors)} failed"] if self.errors else []
        parts += [] if left is None else [f"about {clock(left)} left"]
        return ", ".join(parts)


class Display:
    """On a terminal a live table of the running cells; in a file a line per cell that ends, and now and then the rest.

    Enter it around the run.
    """

    def __init__(self, progress: Progress, console: Console) -> None:
        self.progress, self.console, self.said = progress, console, time.monotonic()
        self.live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self) -> None:
        """Redraw the table, or report the running cells if nothing was printed for a while."""
        if self.live is not None:
            self.live.update(self._table())
        elif time.monotonic() - self.said >= LINE_SECONDS:
            running = (
                f"{worker.cell.method} seed {worker.cell.seed} update {worker.seen.get('update', 0):.0f}"
                for worker in self.progress.running
            )
            self._say(f"running: {', '.join(running)}")

    def ended(self, cell: Cell) -> None:
        """Report how a cell ended; a finished one is counted in the table."""
        name, reason = f"{cell.method}, {cell.setting}, seed {cell.seed}", self.progress.errors.get(cell.id)
        if self.live is None:
            self._say(f"{name} finished" if reason is None else f"{name} failed: {reason}")
        elif reason is not None:
            self.console.print(f"{name} failed: {reason}", style="red", highlight=False)

    def _say(self, what: str) -> None:
        self.said = time.monotonic()
        self.console.print(f"{what} ({self.progress})", highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(caption=str(self.progress), box=None, padding=(0, 2, 0, 0))
        for heading in ("cell", "seed", "update", "score", "KL", "time"):
            table.add_column(heading, justify="left" if heading == "cell" else "right", no_wrap=heading != "cell")
        for worker in self.progress.running:
            cell, seen = worker.cell, worker.seen
            numbers = [f"{seen['score']:+.2f}", f"{seen['kl']:.2f}"] if seen else ["", ""]
            update = f"{seen.get('update', 0):.0f} of {cell.updates}"
            table.add_row(f"{cell.method}, {cell.setting}", str(cell.seed), update, *numbers, clock(worker.elapsed))
        return table
