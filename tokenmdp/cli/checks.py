"""What the commands check before they load a model: numbers, and the places that they will write to."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

LARGEST_SEED = 2**63 - 1  # that PyTorch takes


def check_numbers(options: Any, **leasts: int) -> None:
    """Refuse options below their least values, which ``leasts`` give by field, and a seed that is none.

    Raises:
        ValueError: with the first such option and its value.

    >>> from types import SimpleNamespace
    >>> check_numbers(SimpleNamespace(num=0, seed=1), num=1)
    Traceback (most recent call last):
    ValueError: --num is 0; it must be at least 1
    """
    for name, least in leasts.items():
        if (value := getattr(options, name)) is not None and not value >= least:  # NaN
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if hasattr(options, "seed"):
        check_seed(options.seed)


def check_seed(seed: int, flag: str = "--seed") -> None:
    """Refuse seeds that random number generators do not take.

    Raises:
        ValueError: with the seed.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"{flag} is {seed}; it must lie in 0 to {LARGEST_SEED}")


def check_page(page: Path | None) -> None:
    """`check_file` for the option --html."""
    check_file(page, "--html", "page.html")


def check_file(path: Path | None, flag: str, example: str) -> None:
    """Refuse a file to write that would replace a directory, or lie where none can be written.

    Raises:
        ValueError: with the path.
    """
    if path is None:
        return
    check_home(path, flag)
    if path.is_dir():
        raise ValueError(f"{flag} is {path}, a directory; give a file, such as {path / example}")
    check_directory(path.parent, flag=flag)


def check_home(path: Path | None, flag: str = "--out") -> None:
    """Refuse a path to write to that begins with ``~``, which would become the name of a directory.

    Raises:
        ValueError: with the path.
    """
    if str(path).startswith("~"):
        raise ValueError(
            f"{flag} is {path}; only a shell writes ~ out: leave the quotation marks out, or give the path"
        )


def check_directory(path: Path | None, flag: str = "--out") -> None:
    """Refuse a directory to write into that is a file, would lie in one, begins with ``~`` or cannot be written.

    Args:
        path: Of the directory, which need not exist.
        flag: The option that names it.

    Raises:
        ValueError: with what is in the way.
    """
    if path is None:
        return
    check_home(path, flag)
    place = next((place for place in (path, *path.parents) if place.exists()), Path())  # "." was deleted
    if not place.is_dir():
        raise ValueError(f"{flag} needs the directory {path}, and {place} is a file; choose another place")
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise ValueError(f"{flag} needs the directory {path}, and {place} cannot be written ({error})") from error
