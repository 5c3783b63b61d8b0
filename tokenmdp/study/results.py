"""A cell, one training run of a study: its ID, its result, and the file that holds it, with format and versions.

A cell's ID is a hash of everything that decides what it computes, so a cell of two grids is run once.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from tokenmdp.files import write_text
from tokenmdp.report.samples import Sample
from tokenmdp.runs.settings import RunSettings, settings_from_record, settings_record

FORMAT = 3  # 2: settings name the algorithm and its configuration; 3: uniform credit has a credit_beta
PACKED = "cells.jsonl.xz"  # finished cells in one file, the text of each cell's file on a line
SIGNIFICANT_DIGITS = 6  # of a column's numbers in a file
PACKAGES = ("tokenmdp", "torch", "transformers", "tokenizers", "gymnasium", "numpy")


class StudyError(ValueError):
    """A study's directory cannot be used as asked; the message names the path and the remedy."""


@dataclass(frozen=True)
class Cell:
    """One training run of a grid."""

    method: str  # its name in figures and tables: "attention", "attention credit_beta=0.4"
    seed: int
    setting: str  # their name for everything that is neither method nor seed: "8-16 tokens, kl_coef=0.1"
    settings: RunSettings  # what both labels stand for
    updates: int
    gold: str | None  # a second reward model, never seen by the policy
    eval_every: int  # updates between evaluations
    eval_samples: int

    @property
    def id(self) -> str:
        """A hash of what the cell computes, as a name for files: the same under any labels."""
        lengths = self.settings.horizon_range or (self.settings.max_new_tokens,)
        words = (self.settings.credit, "to".join(map(str, lengths)), f"s{self.seed}")
        content = json.dumps({**cell_record(self), "method": "", "setting": ""}, sort_keys=True)
        return f"{'-'.join(words)}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class CellResult:
    """The result of a finished cell."""

    cell: Cell
    metrics: dict[str, list[float]]  # column -> one value per update
    evaluations: dict[str, list[float]]  # column -> one value per evaluation on held-out prompts; "update" is one
    samples: list[Sample]  # of the last evaluation, with credits
    seconds: float
    versions: dict[str, str]
    costs: dict[str, float] = field(default_factory=dict)  # as `worker.costs_of` says; {} in older files


def cell_record(cell: Cell) -> dict[str, Any]:
    """A cell as JSON values."""
    record = {key: getattr(cell, key) for key in ("method", "seed", "setting", "updates", "gold")}
    return record | {
        "eval_every": cell.eval_every,
        "eval_samples": cell.eval_samples,
        "settings": settings_record(cell.settings),
    }


def cell_from_record(record: Mapping[str, Any]) -> Cell:
    """The cell that `cell_record` made."""
    return Cell(**{**record, "settings": settings_from_record(record["settings"])})


def rounded(value: float) -> float:
    """Round to the digits that files keep.

    >>> rounded(1234.56789), rounded(0.000123456789)
    (1234.57, 0.000123457)
    """
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else value


def write_result(path: str | Path, result: CellResult) -> Path:
    """Write a finished cell into the study at ``path``, atomically; remove its progress and an earlier error."""
    place = cell_file(path, result.cell.id)
    columns = {
        name: {key: [rounded(value) for value in column] for key, column in getattr(result, name).items()}
        for name in ("metrics", "evaluations")
    }
    samples = [
        {
            **asdict(sample),
            "credits": [rounded(credit) for credit in sample.credits],
            "score": rounded(sample.score),
            "facts": {key: rounded(fact) for key, fact in sample.facts.items()},
        }
        for sample in result.samples
    ]
    record = {
        "format": FORMAT,
        "cell": cell_record(result.cell),
        "seconds": round(result.seconds, 1),
        "versions": result.versions,
        "costs": {key: rounded(cost) for key, cost in result.costs.items()},
        **columns,
        "samples": samples,
    }
    write_text(place, json.dumps(record) + "\n")
    for suffix in (".progress", ".error.txt"):
        cell_file(path, result.cell.id, suffix).unlink(missing_ok=True)
    return place


def read_result(path: str | Path, id: str) -> CellResult:
    """The finished cell that `write_result` wrote.

    Raises:
        StudyError: the file is damaged, or of another format.
    """
    place = cell_file(path, id)
    try:
        return result_of(place.read_text(encoding="utf-8"), place)
    except OSError as error:
        raise StudyError(f"{place} holds no finished cell ({error!r}); delete it and the cell is run again") from error


def packed_results(path: str | Path) -> dict[str, CellResult]:
    """Id -> finished cell, of those that are packed in the study at ``path``; none without such a file.

    Raises:
        StudyError: the file is damaged, or of another format.
    """
    place = Path(path) / PACKED
    results = [result_of(line, place) for line in packed_lines(place)]
    return {result.cell.id: result for result in results}


def packed_lines(place: Path) -> list[str]:
    """The text of every cell in a packed file; none without one.

    Raises:
        StudyError: it is damaged.
    """
    try:
        return lzma.decompress(place.read_bytes()).decode().splitlines() if place.exists() else []
    except (OSError, ValueError, lzma.LZMAError) as error:
        raise StudyError(f"{place} cannot be read ({error}); restore a copy") from error


def result_of(text: str, place: Path) -> CellResult:
    """The finished cell whose file ``place`` has this text.

    Raises:
        StudyError: it is damaged, or of another format.
    """
    try:
        record = json.loads(text)
        check_format(record, place)
        return CellResult(
            cell_from_record(record["cell"]),
            record["metrics"],
            record["evaluations"],
            [Sample(**sample) for sample in record["samples"]],
            record["seconds"],
            record["versions"],
            record.get("costs", {}),
        )
    except StudyError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        remedy = "restore a copy" if place.name == PACKED else "delete it and the cell is run again"
        raise StudyError(f"{place} holds no finished cell ({error!r}); {remedy}") from error


def cell_file(path: str | Path, id: str, suffix: str = ".json") -> Path:
    """The file in which the study at ``path`` keeps something about a cell."""
    return Path(path) / "cells" / f"{id}{suffix}"


def tokenmdp_version() -> str:
    """The version that a study records."""
    return package_versions(("tokenmdp",))["tokenmdp"]


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The versions of what decides a cell's numbers, "unknown" for a checkout that is not installed."""
    versions = {} if names != PACKAGES else {"python": python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def check_format(record: Mapping[str, Any], place: Path) -> None:
    """Refuse a file of another format.

    Raises:
        StudyError: it is.
    """
    if record.get("format") != FORMAT:
        raise StudyError(
            f"{place} has format {record.get('format')!r} and this version of tokenmdp reads {FORMAT}: use the "
            "version that wrote it, or choose another directory"
        )
