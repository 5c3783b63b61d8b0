"""A finished study in little room."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

from tokenmdp.files import write_bytes, write_text
from tokenmdp.study.directory import read_record, study_text
from tokenmdp.study.results import PACKED, packed_lines


def pack_cells(path: str | Path) -> Path:
    """Move the finished cells of the study at ``path`` into one compressed file, about a fifth of their size.

    A packed study is reported on like any other, number for number, but no cell can be added to it. The settings of
    its cells are in the same file, no longer in ``study.json``.

    Returns:
        The file.
    """
    place, files = Path(path) / PACKED, sorted((Path(path) / "cells").glob("*.json"))
    lines = [*packed_lines(place), *(file.read_text(encoding="utf-8").strip() for file in files)]
    write_bytes(place, lzma.compress("".join(f"{line}\n" for line in lines).encode(), preset=9 | lzma.PRESET_EXTREME))
    record = read_record(Path(path) / "study.json")
    packed = {json.dumps(json.loads(line)["cell"], sort_keys=True) for line in lines}
    left = {id: cell for id, cell in record["cells"].items() if json.dumps(cell, sort_keys=True) not in packed}
    write_text(Path(path) / "study.json", study_text(record | {"cells": left}))
    for file in files:
        file.unlink()
    return place
