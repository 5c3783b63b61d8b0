"""A study on disk: cells (one training run each), their results, and the grids they belong to.

study.json             the grids: their arguments, their cells and what these are called; all cells as settings
cells/ID.json          a finished cell
cells/ID.progress      how far a running one is
cells/ID.error.txt     why one crashed
quality/NAME.json      credit quality of every method on a reward model
report/                written from the rest at any time

A cell's ID is a hash of everything that decides what it computes, so a cell of two grids is run once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from tokenmdp.checkpoints import write_text
from tokenmdp.commands.settings import RunSettings, settings_from_record, settings_record
from tokenmdp.report.samples import Sample
from tokenmdp.study.locking import locked

FORMAT = 1
SIGNIFICANT_DIGITS = 6  # of a column's numbers in a file
OWN_ENTRIES = {"cells", "quality", "report", "learning_rates.json"}  # beside study.json
OF_A_METHOD = ("credit", "credit_beta", "credit_options", "seed")  # settings in which the runs of a setting differ
PACKAGES = ("tokenmdp", "torch", "transformers", "tokenizers", "gymnasium", "numpy")


class StudyError(ValueError):
    """A study's directory cannot be used as asked; the message names the path and the remedy."""


@dataclass(frozen=True)
class Cell:
    """One training run of a grid."""

    method: str  # what figures and tables call it: "attention", "attention credit_beta=0.4"
    seed: int
    setting: str  # what they call all that is neither method nor seed: "8-16 tokens, kl_coef=0.1"
    settings: RunSettings  # the truth behind both labels
    updates: int
    gold: str | None  # a second reward model, never seen by the policy
    eval_every: int  # updates between evaluations
    eval_samples: int

    @property
    def id(self) -> str:
        """What the cell computes, as a name for files: the same under any labels."""
        lengths = self.settings.horizon_range or (self.settings.max_new_tokens,)
        words = (self.settings.credit, "to".join(map(str, lengths)), f"s{self.seed}")
        content = json.dumps({**cell_record(self), "method": "", "setting": ""}, sort_keys=True)
        return f"{'-'.join(words)}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class CellResult:
    """What a finished cell leaves."""

    cell: Cell
    metrics: dict[str, list[float]]  # column -> one value an update
    evaluations: dict[str, list[float]]  # column -> one value an evaluation on held-out prompts; "update" is one
    samples: list[Sample]  # of the last evaluation, with credits
    seconds: float
    versions: dict[str, str]
    costs: dict[str, float] = field(default_factory=dict)  # as `worker.costs_of` says; {} in older files


@dataclass(frozen=True)
class Study:
    """Everything in a study's directory."""

    path: Path
    grids: dict[str, list[str]]  # grid -> cell ids, finished or not
    cells: dict[str, Cell]
    results: dict[str, CellResult]  # of the finished ones
    errors: dict[str, str]  # id -> the last line of the traceback
    quality: dict[str, dict[str, Any]]  # reward model -> the record of its quality file
    commands: dict[str, list[str]] = field(default_factory=dict)  # grid -> all command lines that added to it
    labels: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)  # grid -> id -> (setting, method)
    version: str = ""  # of tokenmdp
    packages: dict[str, str] = field(default_factory=dict)

    def select(self, grid: str) -> dict[tuple[str, str], list[CellResult]]:
        """(setting, method) -> finished results sorted by seed, in the grid's order, under the grid's own labels.

        A pair without a finished cell is left out; a grid that is not there is empty.
        """
        selected: dict[tuple[str, str], list[CellResult]] = {}
        for cell in self.declared(grid):
            if cell.id in self.results:
                result = replace(self.results[cell.id], cell=cell)
                selected.setdefault((cell.setting, cell.method), []).append(result)
        return {pair: sorted(results, key=lambda result: result.cell.seed) for pair, results in selected.items()}

    def declared(self, grid: str) -> list[Cell]:
        """A grid's cells, finished or not, under the grid's own labels."""
        labels = self.labels.get(grid, {})
        cells = []
        for id in self.grids.get(grid, ()):
            setting, method = labels.get(id, (self.cells[id].setting, self.cells[id].method))
            cells.append(replace(self.cells[id], setting=setting, method=method))
        return cells


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
    """To the digits that files keep.

    >>> rounded(1234.56789), rounded(0.000123456789)
    (1234.57, 0.000123457)
    """
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else value


def write_result(path: str | Path, result: CellResult) -> Path:
    """Write a finished cell into the study at ``path``, atomically; its progress and an earlier error go."""
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
        record = json.loads(place.read_text(encoding="utf-8"))
        _check_format(record, place)
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
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise StudyError(f"{place} holds no finished cell ({error!r}); delete it and the cell is run again") from error


def cell_file(path: str | Path, id: str, suffix: str = ".json") -> Path:
    """Where the study at ``path`` keeps something of a cell."""
    return Path(path) / "cells" / f"{id}{suffix}"


def declare(path: str | Path, grid: str, cells: Sequence[Cell], arguments: Mapping[str, Any]) -> None:
    """Add cells to a grid in the ``study.json`` of the study at ``path``; what the grid has already stays.

    The runs of a method in a setting differ by their seed alone: where it comes with another learning rate, or with
    other options under the same label, its earlier cells leave the grid, whatever their seeds. Of a cell that is in no
    grid any more only its result stays, which is found where the cell is declared again.

    Raises:
        StudyError: the directory holds something else, or results of another version, to which none may be added, or
            a setting of the grid whose runs cannot be compared with these.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        place = path / "study.json"
        if place.exists():
            record = _read_study(place)
            if record["version"] != tokenmdp_version():
                raise StudyError(
                    f"{path} holds results of tokenmdp {record['version']} and this is {tokenmdp_version()}, whose "
                    "numbers may differ: choose another --out, or pass --report-only to write its report"
                )
        else:
            found = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
            if strangers := sorted(found - OWN_ENTRIES):
                raise StudyError(
                    f"{path} holds {', '.join(strangers[:3])} but no study.json, so it is not a study; "
                    "nothing there was touched: choose another --out"
                )
            record = {"format": FORMAT, "version": tokenmdp_version(), "grids": {}, "cells": {}}
        try:
            record["grids"][grid] = _extended(record, grid, cells, arguments, path)
            known = record["cells"] | {cell.id: cell_record(cell) for cell in cells if cell.id not in record["cells"]}
            held = {id for kept in record["grids"].values() for id in kept["cells"]}
            record["cells"] = {id: cell for id, cell in known.items() if id in held}
        except (TypeError, KeyError, AttributeError) as error:
            raise _damaged(place, error) from error
        record["packages"] = package_versions()
        write_text(place, _study_text(record))


def _extended(
    record: Mapping[str, Any], grid: str, cells: Sequence[Cell], arguments: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """A grid's entry with ``cells`` added."""
    old = record["grids"].get(grid, {"arguments": {}, "cells": {}})
    earlier = {id: _common(record["cells"][id]) for id in old["cells"]}
    settings = {label["setting"]: id for id, label in old["cells"].items()}
    for cell in cells:
        if cell.setting not in settings or cell.id in old["cells"]:
            continue
        before, now = earlier[settings[cell.setting]], _common(cell_record(cell))
        if differing := [key for key in before | now if before.get(key) != now.get(key)]:
            was, gets = (json.dumps(each.get(differing[0])) for each in (before, now))
            raise StudyError(
                f"the grid {grid!r} in {path} has runs called {cell.setting!r} with {differing[0]} {was}, and these "
                f"would have {gets}, which cannot be compared under one name: choose another --out"
            )
    new = {cell.id: {"setting": cell.setting, "method": cell.method} for cell in cells}
    given = {(cell.setting, cell.method): _unseeded(cell_record(cell)) for cell in cells}
    kept = {
        id: label
        for id, label in old["cells"].items()
        if (pair := (label["setting"], label["method"])) not in given or given[pair] == _unseeded(record["cells"][id])
    }
    commands = [*_commands(old), *_commands({"arguments": arguments})]
    return {"arguments": dict(arguments), "commands": list(dict.fromkeys(commands)), "cells": {**kept, **new}}


def _common(record: Mapping[str, Any]) -> dict[str, Any]:
    """What all runs of one setting have in common: everything but the method, its learning rate and the seed."""
    settings = {key: value for key, value in record["settings"].items() if key not in OF_A_METHOD}
    ppo = {key: value for key, value in settings.pop("ppo").items() if key != "learning_rate"}
    return settings | ppo | {key: record[key] for key in ("updates", "gold", "eval_every", "eval_samples")}


def _unseeded(record: Mapping[str, Any]) -> str:
    """The settings that all runs of a method in one setting share, as text."""
    return json.dumps({**record["settings"], "seed": None}, sort_keys=True)


def _commands(kept: Mapping[str, Any]) -> list[str]:
    """The command lines of a grid's entry; the first format kept the last one only."""
    if "commands" in kept:
        return kept["commands"]
    return [kept["arguments"]["command"]] if "command" in kept["arguments"] else []


def read_cell(path: str | Path, id: str) -> Cell:
    """One cell of the study at ``path``, finished or not.

    Raises:
        StudyError: there is no such cell.
    """
    cells = _read_study(Path(path) / "study.json").get("cells", {})
    if id not in cells:
        raise StudyError(f"{path} has no cell {id!r}; it has {', '.join(list(cells)[:3]) or 'none'} ...")
    return cell_from_record(cells[id])


def load_study(path: str | Path) -> Study:
    """Read a study's directory.

    Raises:
        StudyError: there is no study, one of another format, or a damaged file.
    """
    path = Path(path)
    place = path / "study.json"
    record = _read_study(place)
    try:
        cells = {id: cell_from_record(cell) for id, cell in record["cells"].items()}
        grids = {grid: list(kept["cells"]) for grid, kept in record["grids"].items()}
        labels = {
            grid: {id: (label["setting"], label["method"]) for id, label in kept["cells"].items()}
            for grid, kept in record["grids"].items()
        }
        commands = {grid: _commands(kept) for grid, kept in record["grids"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(place, error) from error
    results, errors = {}, {}
    for id in cells:
        if cell_file(path, id).exists():
            results[id] = read_result(path, id)
            continue
        with contextlib.suppress(FileNotFoundError):  # another command may be trying that cell again
            trace = cell_file(path, id, ".error.txt").read_text(encoding="utf-8").strip()
            errors[id] = without_directories((trace or "no message").splitlines()[-1])
    quality = {}
    for file in sorted((path / "quality").glob("*.json")):
        measured = _read_json(file)
        try:
            quality[measured["arguments"]["reward_model"]] = measured
        except (TypeError, KeyError) as error:
            raise _damaged(file, error) from error
    return Study(
        path, grids, cells, results, errors, quality, commands, labels, record["version"], record.get("packages", {})
    )


def quality_file(path: str | Path, reward_model: str) -> Path:
    """Where the study at ``path`` keeps a reward model's credit quality.

    A name that has to be changed for it has a hash added, so that no two names share a file.

    >>> quality_file("runs", "imdb-tiny").name, quality_file("runs", "me/reward").name
    ('imdb-tiny.json', 'me-reward-33d396fc.json')
    """
    shown = slug(model_name(reward_model))
    added = "" if shown == reward_model else f"-{hashlib.sha256(reward_model.encode()).hexdigest()[:8]}"
    return Path(path) / "quality" / f"{shown}{added}.json"


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


def slug(label: str) -> str:
    """A label as part of a file name.

    >>> slug("8-16 tokens, kl_coef=0.1")
    '8-16-tokens-kl_coef-0.1'
    """
    return re.sub(r"[^\w.-]+|=", "-", label).strip("-.")


def model_name(name: str) -> str:
    """What tables, figures and labels call a model: its name, of an absolute path only the last part.

    >>> model_name("lvwerra/gpt2-imdb"), model_name("/home/me/models/reward")
    ('lvwerra/gpt2-imdb', 'reward')
    """
    return Path(name).name if Path(name).is_absolute() else name


def without_directories(text: str) -> str:
    """The text with the last part of each absolute path in it: the directories are those of one machine.

    >>> without_directories('File "/home/me/credit.py", line 3: no /home/me/models/reward, see https://a.org/b/c')
    'File "credit.py", line 3: no reward, see https://a.org/b/c'
    """
    quoted = re.sub(r"""(["'])/(?:[^"'/\n]+/)+(?=[^"'/\n]*\1)""", r"\1", text)
    return re.sub(r"(?<![\w.~/-])/(?:[^\s/\"':]+/)+", "", quoted)


def _study_text(record: Mapping[str, Any]) -> str:
    """One line a grid and a cell: readable, and easy to compare."""

    def lines(entries: Mapping[str, Any]) -> str:
        inner = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
        return "{\n" + inner + "\n }"

    parts = (
        f" {json.dumps(key)}: {lines(value) if key in ('grids', 'cells') and value else json.dumps(value)}"
        for key, value in record.items()
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _read_study(place: Path) -> dict[str, Any]:
    if not place.exists():
        raise StudyError(f"{place.parent} holds no study (no {place.name}); run `tokenmdp ablate --out {place.parent}`")
    record = _read_json(place)
    _check_format(record, place)
    if lacking := [key for key in ("version", "grids", "cells") if key not in record]:
        raise _damaged(place, f"it has no {lacking[0]}")
    return record


def _damaged(place: Path, what: object) -> StudyError:
    return StudyError(f"{place} is damaged ({what}); delete it and run the same command again: finished cells stay")


def _read_json(place: Path) -> dict[str, Any]:
    try:
        record = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{place} cannot be read ({error}); delete it and run the same command again") from error
    if not isinstance(record, dict):
        raise StudyError(f"{place} holds a {type(record).__name__}, no record; was it written by another program?")
    return record


def _check_format(record: Mapping[str, Any], place: Path) -> None:
    if record.get("format") != FORMAT:
        raise StudyError(
            f"{place} has format {record.get('format')!r} and this version of tokenmdp reads {FORMAT}: use the "
            "version that wrote it, or choose another directory"
        )
