"""Files of results: one per run of ``curves``, one per seed of ``time``; written whole, read back for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from learning_parts.engines import Record
from learning_parts.protocol import Protocol, Run, run_from
from tokenmdp.files import write_text


class ResultError(RuntimeError):
    """A file of results that this command cannot continue with."""


@dataclass
class CurveResult:
    """The records of a run of ``curves`` so far."""

    run: Run
    machine: dict[str, Any]
    records: list[Record] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the last update is done."""
        return len(self.records) >= self.run.protocol.updates

    def write(self, out: Path) -> None:
        """Replace the run's file in one go."""
        content = {**self.run.to_json(), "machine": self.machine, "records": self.records}
        write_text(curve_file(out, self.run), json.dumps(content) + "\n")


@dataclass
class RaceResult:
    """The records of the sides of ``time`` for one seed.

    Attributes:
        runs: side -> its run; all have the same protocol and seed.
        targets: mean scores to reach, ascending.
        records: side -> one record per update that it made.
    """

    runs: dict[str, Run]
    targets: tuple[float, ...]
    machine: dict[str, Any]
    records: dict[str, list[Record]] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The seed of all sides."""
        return next(iter(self.runs.values())).seed

    def write(self, out: Path) -> None:
        """Replace the seed's file in one go."""
        content = asdict(self) | {"runs": {name: run.to_json() for name, run in self.runs.items()}}
        write_text(race_file(out, self.seed), json.dumps(content) + "\n")


def curve_file(out: Path, run: Run) -> Path:
    """The file of a run of ``curves``."""
    return out / "curves" / f"{run.name}.json"


def race_file(out: Path, seed: int) -> Path:
    """The file of a seed of ``time``."""
    return out / "time" / f"seed{seed}.json"


def read_curve(path: Path) -> CurveResult:
    """A run of ``curves``, finished or not."""
    content = _read(path)
    return CurveResult(run_from(content), content["machine"], content["records"])


def read_race(path: Path) -> RaceResult:
    """A seed of ``time``."""
    content = _read(path)
    runs = {name: run_from(run) for name, run in content["runs"].items()}
    return RaceResult(runs, tuple(content["targets"]), content["machine"], content["records"])


def curves_in(out: Path) -> list[CurveResult]:
    """Every run of ``curves``: TRL first, then by engine and seed."""
    found = [read_curve(path) for path in (out / "curves").glob("*.json")]
    return sorted(found, key=lambda result: (not result.run.engine.is_trl, result.run.engine.name, result.run.seed))


def races_in(out: Path) -> list[RaceResult]:
    """Every seed of ``time``."""
    return sorted((read_race(path) for path in (out / "time").glob("*.json")), key=lambda result: result.seed)


def unfinished_curves(out: Path, runs: Sequence[Run]) -> list[Run]:
    """Those of ``runs`` that are still to be made.

    Raises:
        ResultError: a run's file is of other settings.
    """
    left = []
    for run in runs:
        path = curve_file(out, run)
        found = read_curve(path) if path.exists() else None
        if found is not None and found.run != run:
            raise ResultError(f"{path} holds other settings ({found.run}, not {run}); choose another --out")
        if found is None or not found.finished:
            left.append(run)
    return left


def has_race(out: Path, runs: Mapping[str, Run], targets: Sequence[float], seed: int) -> bool:
    """Whether the seed is done.

    Raises:
        ResultError: its file is of other settings.
    """
    path = race_file(out, seed)
    if not path.exists():
        return False
    found = read_race(path)
    if found.runs != runs or found.targets != tuple(targets):
        raise ResultError(f"{path} holds other settings (sides {', '.join(found.runs)}); choose another --out")
    return True


def protocol_of(results: Sequence[CurveResult]) -> Protocol:
    """The one protocol of all results.

    Raises:
        ResultError: they have several, or there is none.
    """
    protocols = {result.run.protocol for result in results}
    if not protocols:
        raise ResultError("there is no run of curves")
    if len(protocols) > 1:
        raise ResultError("the runs differ in their protocols; report them from directories of their own")
    return protocols.pop()


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} cannot be read ({error}); delete it and run the command again") from error
