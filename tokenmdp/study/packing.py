"""A finished study in little room."""

from __future__ import annotations

import lzma
from pathlib import Path

from tokenmdp.files import locked, write_bytes, write_text
from tokenmdp.study.directory import read_record, study_text
from tokenmdp.study.results import PACKED, packed_lines, result_of


def pack_cells(path: str | Path) -> Path:
    """Move the finished cells of the study at ``path`` into one compressed file, about a fifth of their size.

    A packed study is reported on like any other, number for number, but no cell can be added to it. The settings of
    its cells are in the same file, no longer in ``study.json``.

    Returns:
        The file.

    Raises:
        StudyError: there is no study, or a damaged file; nothing was changed.
    """
    path = Path(path)
    place = path / PACKED
    with locked(path):
        record = read_record(path / "study.json")
        files = sorted((path / "cells").glob("*.json"))
        packed = {result_of(line, place).cell.id: line for line in packed_lines(place)}
        for file in files:
            line = file.read_text(encoding="utf-8").strip()
            packed[result_of(line, file).cell.id] = line
        text = "".join(f"{line}\n" for line in packed.values())
        write_bytes(place, lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
        left = {id: cell for id, cell in record["cells"].items() if id not in packed}
        write_text(path / "study.json", study_text(record | {"cells": left}))
        for file in files:
            file.unlink()
    return place
