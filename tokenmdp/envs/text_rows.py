"""Texts from files: .txt, .json, .jsonl, .csv and .parquet, with the place of each, for messages.

A row is a text or a list of token ids. In rows that have columns (JSON objects, .csv, .parquet) the column ``prompt``
holds prompts, else ``text`` holds texts whose openings are prompts; any other column is given by its name.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from tokenmdp.models.encoding import is_chat
from tokenmdp.models.tokens import check_text
from tokenmdp.text_files import lines_of, parse_json, read_text

FILE_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet")
PROMPT, TEXT = "prompt", "text"
DELIMITERS = ",;\t"
MISSING = ("NAType", "NaTType")  # of pandas


class PromptsNotFound(gym.error.Error, OSError):
    """A prompt source that names no file, data set or bundled list."""


class Prompts(list[Any]):
    """Prompts, or texts whose openings are prompts, each with its place, such as "line 3 of prompts.txt".

    Args:
        values: texts, chats (lists of messages) or lists of token ids.
        places: as many.
        openings: the first tokens of a text are the prompt, not all of it.
    """

    def __init__(self, values: Iterable[Any] = (), places: Iterable[str] = (), openings: bool = False) -> None:
        super().__init__(values)
        self.places, self.openings = list(places), openings

    def part(self, chosen: Iterable[int]) -> Prompts:
        """Those with the indices ``chosen``."""
        chosen = list(chosen)
        return Prompts([self[index] for index in chosen], [self.places[index] for index in chosen], self.openings)


def read_rows(path: Path, column: str | None = None) -> Prompts:
    """The rows of a file; blank lines of a ``.txt`` or ``.jsonl`` file are none.

    Args:
        path: JSON holds a list, or ``{"prompts": [...]}``; each line of a JSONL file holds one row.
        column: Of rows that have columns; None: ``prompt``, else ``text``.

    Raises:
        PromptsNotFound: there is no such file.
        ValueError: another kind of file, a damaged one, or a row that is no text; the message names the row.
    """
    if path.suffix not in FILE_SUFFIXES:
        kind = "directory" if path.is_dir() else "file"
        raise ValueError(f"{path} is a {kind}, but only {', '.join(FILE_SUFFIXES)} files are read as prompts or texts")
    if not path.is_file():
        raise PromptsNotFound(f"no file {path}; give an existing {', '.join(FILE_SUFFIXES)} file")
    if path.suffix == ".parquet":
        return parquet_rows([path], column)
    text = read_text(path)
    if path.suffix == ".csv":
        return _csv_rows(text, path, column)
    if path.suffix == ".json":
        content = parse_json(text, str(path))
        found = content.get("prompts") if isinstance(content, dict) else content
        if not isinstance(found, list):
            keys = f" with the keys {', '.join(map(repr, list(content)[:5]))}" if isinstance(content, dict) else ""
            raise ValueError(
                f"{path} holds {_kind(content)}{keys}; a list of prompts or {{'prompts': [...]}} is needed"
            )
        return checked_rows(found, [f"row {number} of {path}" for number in range(1, len(found) + 1)], column)
    lines = [(f"line {number} of {path}", line.removeprefix("\ufeff")) for number, line in enumerate(lines_of(text), 1)]
    lines = [(place, line) for place, line in lines if line.strip()]
    rows = [line if path.suffix == ".txt" else parse_json(line, place) for place, line in lines]
    return checked_rows(rows, [place for place, _ in lines], column)


def _csv_rows(text: str, path: Path, column: str | None) -> Prompts:
    """Rows of a table whose first line names the columns, separated by commas, semicolons or tabs."""
    for delimiter in DELIMITERS:
        names = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])  # not strict: it may be wrong
        if (column is None and not {PROMPT, TEXT} & set(names)) or (column is not None and column not in names):
            continue
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows, places, line = [], [], 0
        try:
            names = list(reader.fieldnames or [])
            line = reader.line_num
            if repeated := [name for name in (column, PROMPT, TEXT) if name and names.count(name) > 1]:
                raise ValueError(f"{path} has the column {repeated[0]!r} twice; rename one of them")
            for row in reader:
                place = f"line {line + 1} of {path}"
                if more := row.pop(None, None):
                    raise ValueError(
                        f"{place} has {len(names) + len(more)} fields and the first line names {len(names)}; put "
                        f"texts that hold a {delimiter!r} in quotation marks"
                    )
                rows.append(row)
                places.append(place)
                line = reader.line_num
        except csv.Error as error:
            raise ValueError(f"line {line + 1} of {path} is not CSV ({error})") from error
        return checked_rows(rows, places, column)
    first = next(csv.reader(io.StringIO(text, newline="")), [])
    raise ValueError(lacking(str(path), first, column))


def parquet_rows(files: Sequence[Path], column: str | None) -> Prompts:
    """The rows of parquet files, one after the other."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise gym.error.DependencyNotInstalled(
            f"{files[0]} is read with pyarrow: run `pip install 'tokenmdp[datasets]'`"
        ) from error
    values: list[Any] = []
    places: list[str] = []
    openings = False
    for file in files:
        try:
            names = list(parquet.read_schema(file).names)
            name, openings = column_of(names, column, str(file))
            found = parquet.read_table(file, columns=[name]).column(0).to_pylist()
        except ArrowException as error:
            raise ValueError(f"{file} is not a parquet file, or a damaged one ({error})") from error
        values += found
        places += [f"row {number} of {file}" for number in range(1, len(found) + 1)]
    return checked(values, places, openings)


def column_of(names: Sequence[str], column: str | None, where: str) -> tuple[str, bool]:
    """The column to read, and whether the openings of its texts are the prompts.

    Raises:
        ValueError: there is no such column.
    """
    for name, openings in ((PROMPT, False), (TEXT, True)) if column is None else ((column, False),):
        if name in names:
            return name, openings
    raise ValueError(lacking(where, names, column))


def lacking(where: str, names: Sequence[str], column: str | None) -> str:
    """The message for rows without the column that is needed."""
    wanted = f"{PROMPT!r} (prompts) or {TEXT!r} (texts to take openings of)" if column is None else repr(column)
    example = f"; for another column add its name: {where}:NAME" if column is None else ""
    return f"{where} has the columns {', '.join(map(repr, names)) or 'none'}; {wanted} is needed{example}"


def checked_rows(rows: Sequence[Any], places: Sequence[str], column: str | None) -> Prompts:
    """Rows of a file, or of a list, as prompts; those that are objects give their column.

    Raises:
        ValueError: a row is neither a text, a chat nor a list of token ids, or lacks the column.
    """
    values, texts = [], 0
    for row, place in zip(rows, places, strict=True):
        if isinstance(row, Mapping):
            if "role" in row:
                raise ValueError(f"{place} is a message of a chat; make a list of the messages, or one text")
            chat = column is None and PROMPT not in row and "messages" in row
            name, openings = ("messages", False) if chat else column_of(list(row), column, place)
            texts += openings
            row = row[name]
        values.append(row)
    if texts not in (0, len(values)):
        raise ValueError(
            f"{places[0].partition(' of ')[2] or 'the list'} mixes rows of {TEXT!r} with other rows; name the column, "
            "or put all prompts into one"
        )
    return checked(values, places, texts > 0)


def checked(values: Sequence[Any], places: Sequence[str], openings: bool = False) -> Prompts:
    """Values as prompts.

    Raises:
        ValueError: one is neither a text, a chat nor a list of token ids; the message names its place.
    """
    rows: list[Any] = []
    for value, place in zip(values, places, strict=True):
        if isinstance(value, str):
            check_text(value, place)
            rows.append(str(value))
        elif is_chat(value) and not openings:
            rows.append([dict(message) for message in value])
        elif isinstance(value, (np.ndarray, list, tuple)) and len(value) and not isinstance(value[0], Integral):
            raise ValueError(f"{place} is a list of {_kind(value[0])}; give one text, a chat or token ids")
        elif isinstance(value, (np.ndarray, list, tuple)) and not openings:
            rows.append([_token(token, place) for token in value])
        else:
            raise ValueError(
                f"{place} is {_kind(value)}; a prompt is a text{'' if openings else ' or a list of token ids'}: leave "
                "the row out or mend it"
            )
    return Prompts(rows, places, openings)


def _token(token: Any, place: str) -> int:
    if isinstance(token, (bool, np.bool_)) or not isinstance(token, Integral):
        raise ValueError(f"{place} holds {token!r} among its token ids; each is a whole number")
    return int(token)


def _kind(value: Any) -> str:
    """Words for something that is no text."""
    if value is None or type(value).__name__ in MISSING or (isinstance(value, float) and value != value):
        return f"{'null' if value is None else value} (a missing text)"
    kinds = {dict: "an object", list: "a list", bool: "a truth value", bytes: "bytes, not text"}
    shown = repr(value) if isinstance(value, (int, float)) else ""
    return f"{kinds.get(type(value), f'a {type(value).__name__}')}{f' ({shown})' if shown else ''}"
