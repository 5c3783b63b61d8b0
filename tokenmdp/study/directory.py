"""A study on disk: grids, their cells, and the cells' results.

study.json             the grids (arguments, cells, labels), and the settings of every cell that is not packed
cells/ID.json          a finished cell
cells.jsonl.xz         finished cells in one file, if `tokenmdp.study.packing.pack_cells` has made it
cells/ID.progress      how far a running one is
cells/ID.error.txt     why one crashed
quality/NAME.json      credit quality of every method on a reward model
learning_rates.json    what the grid "tune" found
notice.txt             what a reader of the report must know first, if it was written
report/                written from the rest at any time
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenmdp.evaluation.credit_quality.tables import FORMAT as QUALITY_FORMAT
from tokenmdp.files import locked, write_text
from tokenmdp.study.labels import model_name, slug, without_directories
from tokenmdp.study.results import (
    FORMAT,
    PACKED,
    Cell,
    CellResult,
    StudyError,
    cell_file,
    cell_from_record,
    cell_record,
    check_format,
    package_versions,
    packed_results,
    read_result,
    tokenmdp_version,
)

NOTICE = "notice.txt"
OWN_ENTRIES = {"cells", "quality", "report", "learning_rates.json", NOTICE}  # beside study.json
OF_A_METHOD = ("credit", "credit_beta", "credit_options", "seed")  # settings in which the runs of a setting differ


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
    notice: str = ""  # plain text above everything in the report; paragraphs are parted by an empty line

    def select(self, grid: str) -> dict[tuple[str, str], list[CellResult]]:
        """(setting, method) -> finished results sorted by seed, in the grid's order, under the grid's own labels.

        A pair without a finished cell is left out; a grid that does not exist is empty.
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


def declare(path: str | Path, grid: str, cells: Sequence[Cell], arguments: Mapping[str, Any]) -> None:
    """Add cells to a grid in the ``study.json`` of the study at ``path``; what the grid has already stays.

    The runs of a method in a setting differ by their seed alone: where it comes with another learning rate, or with
    other options under the same label, its earlier cells leave the grid, whatever their seeds. Of a cell that is in no
    grid any more only its result stays, which is found where the cell is declared again.

    Raises:
        StudyError: the directory holds something else, packed cells or results of another version, to which none may
            be added, or a setting of the grid whose runs cannot be compared with these.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        place = path / "study.json"
        if (path / PACKED).exists():
            raise StudyError(
                f"{path} holds packed cells, to which none can be added: choose another --out, or pass --report-only "
                "to write its report"
            )
        if place.exists():
            record = read_record(place)
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
        write_text(place, study_text(record))


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
    """The settings that all runs of one setting share: everything but the method, its learning rate and the seed."""
    settings = {key: value for key, value in record["settings"].items() if key not in OF_A_METHOD}
    config = {key: value for key, value in settings.pop("config").items() if key != "learning_rate"}
    return settings | config | {key: record[key] for key in ("updates", "gold", "eval_every", "eval_samples")}


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
    cells = read_record(Path(path) / "study.json").get("cells", {})
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
    record, packed = read_record(place), packed_results(path)
    try:
        declared = dict.fromkeys(id for kept in record["grids"].values() for id in kept["cells"])
        cells = {id: cell_from_record(cell) for id, cell in record["cells"].items()}
        cells = {id: cells[id] if id in cells else packed[id].cell for id in declared if id in cells or id in packed}
        grids = {grid: list(kept["cells"]) for grid, kept in record["grids"].items()}
        labels = {
            grid: {id: (label["setting"], label["method"]) for id, label in kept["cells"].items()}
            for grid, kept in record["grids"].items()
        }
        commands = {grid: _commands(kept) for grid, kept in record["grids"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(place, error) from error
    if lacking := [id for id in declared if id not in cells]:
        raise StudyError(
            f"{path} declares the cell {lacking[0]!r}, whose settings are neither in {place.name} nor in {PACKED}; "
            f"restore a copy of {PACKED}"
        )
    results, errors = {}, {}
    for id in cells:
        if id in packed or cell_file(path, id).exists():
            results[id] = packed[id] if id in packed else read_result(path, id)
            continue
        with contextlib.suppress(FileNotFoundError):  # another command may be trying that cell again
            trace = cell_file(path, id, ".error.txt").read_text(encoding="utf-8").strip()
            errors[id] = without_directories((trace or "no message").splitlines()[-1])
    quality = {}
    for file in sorted((path / "quality").glob("*.json")):
        measured = _read_json(file)
        try:
            quality[measured["arguments"]["reward_model"]] = measured
            if measured["format"] != QUALITY_FORMAT:
                raise KeyError(measured["format"])
        except (TypeError, KeyError) as error:
            raise _damaged(file, error) from error
    return Study(
        path, grids, cells, results, errors, quality, commands, labels, record["version"], record.get("packages", {}),
        notice=_read_notice(path / NOTICE),
    )  # fmt: skip


def quality_file(path: str | Path, reward_model: str) -> Path:
    """The file in which the study at ``path`` keeps a reward model's credit quality.

    A name that has to be changed for it has a hash added, so that no two names share a file.

    >>> quality_file("runs", "imdb-tiny").name, quality_file("runs", "me/reward").name
    ('imdb-tiny.json', 'me-reward-33d396fc.json')
    """
    shown = slug(model_name(reward_model))
    added = "" if shown == reward_model else f"-{hashlib.sha256(reward_model.encode()).hexdigest()[:8]}"
    return Path(path) / "quality" / f"{shown}{added}.json"


def study_text(record: Mapping[str, Any]) -> str:
    """The text of ``study.json``, one line per grid and per cell, so that it is easy to read and compare."""

    def lines(entries: Mapping[str, Any]) -> str:
        compact = json.JSONEncoder(separators=(",", ":")).encode
        inner = ",\n".join(f"  {json.dumps(key)}: {compact(value)}" for key, value in entries.items())
        return "{\n" + inner + "\n }"

    parts = (
        f" {json.dumps(key)}: {lines(value) if key in ('grids', 'cells') and value else json.dumps(value)}"
        for key, value in record.items()
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"


def read_record(place: Path) -> dict[str, Any]:
    """What a ``study.json`` holds.

    Raises:
        StudyError: there is none, it is damaged, or of another format.
    """
    if not place.exists():
        raise StudyError(f"{place.parent} holds no study (no {place.name}); run `tokenmdp ablate --out {place.parent}`")
    record = _read_json(place)
    check_format(record, place)
    if lacking := [key for key in ("version", "grids", "cells") if key not in record]:
        raise _damaged(place, f"it has no {lacking[0]}")
    return record


def _read_notice(place: Path) -> str:
    """The text of a notice; empty where there is none."""
    try:
        return place.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, RecursionError) as error:
        raise StudyError(f"{place} cannot be read ({error}); it must be plain text in UTF-8") from error


def _damaged(place: Path, what: object) -> StudyError:
    remedy = "delete it and run the same command again: finished cells stay"
    if (place.parent / PACKED).exists():
        remedy = "restore a copy, as nothing is added to a study with packed cells"
    return StudyError(f"{place} is damaged ({what}); {remedy}")


def _read_json(place: Path) -> dict[str, Any]:
    try:
        record = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{place} cannot be read ({error}); delete it and run the same command again") from error
    if not isinstance(record, dict):
        raise StudyError(f"{place} holds a {type(record).__name__}, no record; was it written by another program?")
    return record
