"""``time``: all sides in one call, in turn, update by update, until a mean score is reached."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from speed_parts.report import machine

from learning_parts.engines import Record, Update, opened
from learning_parts.protocol import Engine, Protocol, Run
from learning_parts.results import RaceResult, has_race

WINDOW = 10  # consecutive updates whose mean score must reach the target


class Reached(NamedTuple):
    """The update and the time at which a side reached a target."""

    update: int  # the last of the updates whose mean reached it
    seconds: float  # of all updates up to it


def reached(records: Sequence[Record], target: float, window: int = WINDOW) -> Reached | None:
    """The first update that ends ``window`` consecutive ones with a mean score of ``target``; None: not reached.

    >>> records = [{"score": score, "seconds": 2.0} for score in (0.0, 1.0, 3.0)]
    >>> reached(records, 2.0, window=2)
    Reached(update=3, seconds=6.0)
    """
    scores = np.array([record["score"] for record in records])
    if len(scores) < window:
        return None
    sums = np.convolve(scores, np.ones(window), mode="valid")
    if not (places := np.flatnonzero(sums >= target * window)).size:
        return None
    update = int(places[0]) + window
    return Reached(update, sum(record["seconds"] for record in records[:update]))


def race(
    sides: Mapping[str, Update],
    target: float,
    most: int,
    after_update: Callable[[str, list[Record]], None] = lambda name, records: None,
) -> dict[str, list[Record]]:
    """Let the sides make an update each, in turn; one that has reached ``target`` or made ``most`` updates drops out.

    Every second round goes the other way around. A machine that slows down then slows all sides alike.
    """
    records: dict[str, list[Record]] = {name: [] for name in sides}
    running = list(sides)
    while running:
        for name in running:
            records[name].append(sides[name]())
            after_update(name, records[name])
        running = [name for name in running if len(records[name]) < most and reached(records[name], target) is None]
        running.reverse()
    return records


def run_seeds(
    engines: Mapping[str, Engine],
    protocol: Protocol,
    targets: Sequence[float],
    seeds: Sequence[int],
    out: Path,
    trl_venv: Path,
    console: Console,
) -> None:
    """One race per seed, each written when it has ended; finished races are not run again."""
    for seed in seeds:
        runs = {name: Run(engine, protocol, seed) for name, engine in engines.items()}
        if has_race(out, runs, targets, seed):
            console.print(f"seed {seed} is finished already", markup=False)
        else:
            run_seed(runs, targets, trl_venv, console).write(out)
            console.print(f"seed {seed} is finished", markup=False)


def run_seed(runs: Mapping[str, Run], targets: Sequence[float], trl_venv: Path, console: Console) -> RaceResult:
    """The race of one seed, shown as it goes."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[numbers]}"))
    with contextlib.ExitStack() as stack:
        sides: dict[str, Update] = {}
        versions: dict[str, str] = {}
        for name, run in runs.items():
            sides[name], found = stack.enter_context(opened(run, trl_venv))
            versions |= found
        # Drawn between two updates only: a thread that draws would take time from the one that is measured.
        progress = stack.enter_context(Progress(*columns, console=console, auto_refresh=False))
        most = next(iter(runs.values())).protocol.updates
        tasks = {name: progress.add_task(run.name, total=most, numbers="") for name, run in runs.items()}

        def show(name: str, records: list[Record]) -> None:
            score = np.mean([record["score"] for record in records[-WINDOW:]])
            seconds = sum(record["seconds"] for record in records)
            numbers = f"mean score {score:.2f}, {seconds:.0f} s in {len(records)} updates"
            progress.update(tasks[name], completed=len(records), numbers=numbers, refresh=True)

        described = machine(torch.device("cpu")) | {"trl_versions": versions}
        return RaceResult(dict(runs), tuple(targets), described, race(sides, max(targets), most, show))
