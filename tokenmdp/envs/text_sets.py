"""Texts from data sets and objects: a folder, the hub, a `datasets.Dataset`, a column of a table, an array."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from tokenmdp.envs.text_rows import (
    FILE_SUFFIXES,
    Prompts,
    PromptsNotFound,
    checked,
    checked_rows,
    column_of,
    parquet_rows,
    read_rows,
)

TRAIN = "train"


def rows_of_object(source: Any) -> Prompts:
    """The rows of a list, an array, a column of a table, a data set or a dictionary of its splits.

    Raises:
        TypeError: it is none of these.
        ValueError: a row is no text, the column ``prompt`` or ``text`` is missing, or there is no split "train".
    """
    if isinstance(source, Prompts):
        return source
    datasets, pandas = sys.modules.get("datasets"), sys.modules.get("pandas")  # if not imported, it is not theirs
    if datasets is not None:
        if isinstance(source, (datasets.IterableDataset, datasets.IterableDatasetDict)):
            raise TypeError(
                "prompts is a stream, whose rows cannot be drawn at random; pass a list of some of them: "
                "list(itertools.islice(dataset, 10_000))"
            )
        if isinstance(source, datasets.DatasetDict):
            return rows_of_table(_split(source, TRAIN, "the DatasetDict"), "the DatasetDict")
        if isinstance(source, datasets.Dataset):
            return rows_of_table(source, "the Dataset")
    if pandas is not None:
        if isinstance(source, pandas.DataFrame):
            name, openings = column_of(list(source.columns), None, "the DataFrame")
            source = source[name]
            return checked(source.tolist(), _places(len(source)), openings)
        if isinstance(source, pandas.Series):
            source = source.tolist()
    if isinstance(source, np.ndarray):
        if source.ndim not in (1, 2) or (source.ndim == 1 and source.dtype.kind not in "OUT"):
            raise TypeError(
                f"prompts is an array of shape {source.shape} and dtype {source.dtype}; give one of texts (N,), or of "
                "token ids (N, length)"
            )
        source = source.tolist()
    if not isinstance(source, Sequence) or isinstance(source, (bytes, bytearray)):
        raise TypeError(
            f"prompts is a list of texts, a data set, an array, or the name of a source, not {type(source).__name__}"
        )
    values = list(source)
    return checked_rows(values, _places(len(values)), None)


def _places(count: int) -> list[str]:
    return [f"prompt {index}" for index in range(count)]


def rows_of_table(table: Any, where: str, column: str | None = None) -> Prompts:
    """A column of a `datasets.Dataset`: ``column``, else ``prompt``, else ``text``."""
    name, openings = column_of(table.column_names, column, where)
    values = table.with_format(None)[name]
    return checked(list(values), [f"row {row} of {where}" for row in range(1, len(values) + 1)], openings)


def rows_of_name(source: str) -> Prompts:
    """The rows of a data-set directory or of a data set on the hub: ``NAME``, ``NAME:SPLIT`` or ``NAME:SPLIT:COLUMN``.

    A directory is what ``save_to_disk`` wrote, or holds files such as train.parquet, train-00000-of-00002.parquet,
    train.jsonl or train.csv.

    Raises:
        PromptsNotFound: there is no such data set, or it cannot be reached.
        ValueError: the split or the column is missing, or a row is no text.
    """
    name, split, column = name_split_column(source)
    if Path(name).is_dir():
        return _rows_of_directory(Path(name), split, column, source)
    datasets = _datasets(source)
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises many unrelated types when offline or when a name is wrong
        said = str(error) if len(str(error)) <= 200 else f"{str(error)[:197]}..."
        raise PromptsNotFound(
            f"prompts {source!r}: no file or directory of that name, and the data set {name!r} (split {split!r}) "
            f"could not be loaded ({type(error).__name__}: {said}); download it with "
            f"`hf download {name} --repo-type dataset --local-dir DIR` and pass DIR, or give a list of texts"
        ) from error
    return rows_of_table(table, source, column)


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The files of a split below ``folder``: parquet files, else one of the other kinds."""
    shards = sorted({*folder.rglob(f"{split}-*.parquet"), *folder.rglob(f"{split}.parquet")})
    return shards or [file for suffix in FILE_SUFFIXES if (file := folder / f"{split}{suffix}").is_file()]


def has_split(folder: Path, split: str) -> bool:
    """Whether a data-set directory holds ``split``."""
    if (folder / "dataset_dict.json").is_file():
        return (folder / split).is_dir()
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        return split == TRAIN
    return bool(files_of_split(folder, split))


def _rows_of_directory(folder: Path, split: str, column: str | None, source: str) -> Prompts:
    saved = (folder / "dataset_dict.json").is_file(), (folder / "dataset_info.json").is_file()
    if any(saved) and ((folder / "state.json").is_file() or saved[0]):
        datasets = _datasets(source)
        try:
            loaded = datasets.load_from_disk(str(folder))
        except Exception as error:  # datasets and pyarrow raise many types for a damaged file
            raise ValueError(
                f"{folder} cannot be read as a saved data set ({type(error).__name__}: {error}); save it again"
            ) from error
        if isinstance(loaded, datasets.DatasetDict):
            loaded = _split(loaded, split, source)
        elif split != TRAIN:
            raise PromptsNotFound(
                f"prompts {source!r}: {folder} is one saved data set without splits; leave out {split!r}"
            )
        return rows_of_table(loaded, str(folder), column)
    files = files_of_split(folder, split)
    if not files:
        raise PromptsNotFound(
            f"prompts {source!r}: no {split}.parquet, {split}-*.parquet, {split}.jsonl, .json, .csv or .txt in "
            f"{folder}; add ':SPLIT' for another split, or pass the file itself"
        )
    if files[0].suffix == ".parquet":
        return parquet_rows(files, column)
    if len(files) > 1:
        names = " and ".join(file.name for file in files)
        raise ValueError(f"prompts {source!r}: {folder} holds {names}; pass the one that is meant")
    return read_rows(files[0], column)


def _split(splits: Any, split: str, where: str) -> Any:
    if split not in splits:
        names = ", ".join(map(repr, splits))
        raise PromptsNotFound(
            f"{where} has the splits {names} and no {split!r}; choose one, as in NAME:SPLIT or data[SPLIT]"
        )
    return splits[split]


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise gym.error.DependencyNotInstalled(
            f"prompts {source!r} names a data set: run `pip install 'tokenmdp[datasets]'`"
        ) from error
    return datasets


def name_split_column(source: str) -> tuple[str, str, str | None]:
    """``NAME:SPLIT:COLUMN`` in its parts, by default the split "train"; a path that exists is never taken apart.

    >>> name_split_column("stanfordnlp/imdb:test"), name_split_column("stanfordnlp/imdb:test:review")
    (('stanfordnlp/imdb', 'test', None), ('stanfordnlp/imdb', 'test', 'review'))
    """
    parts = source.split(":")
    for used in range(len(parts), 0, -1):
        name, rest = ":".join(parts[:used]), parts[used:]
        if len(rest) <= 2 and (Path(name).exists() or used == 1 or len(rest) == 2):
            split, column = [*rest, "", ""][:2]
            return name, split or TRAIN, column or None
    raise AssertionError(source)  # one part is left in the end
