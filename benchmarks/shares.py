"""Runs that several processes share, each of which is made once."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenmdp.files import write_text


def add_part(parser: argparse.ArgumentParser, runs: str = "run") -> None:
    """The option --part; ``runs[arguments.part]`` are those of one process."""
    parser.add_argument("--part", type=part, default="0/1", metavar="K/N", help=f"every N-th {runs} from the K-th on")


def part(text: str) -> slice:
    """Every N-th from the K-th on, of ``K/N``.

    >>> list(range(5))[part("1/2")]
    [1, 3]

    Raises:
        argparse.ArgumentTypeError: K is not one of 0 to N - 1.
    """
    numbers = re.fullmatch(r"(\d+)/(\d+)", text)
    if numbers is None or int(numbers[1]) >= int(numbers[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with K from 0 to N - 1, such as 0/2 and 1/2")
    return slice(int(numbers[1]), None, int(numbers[2]))


def make_missing(path: Path, make: Callable[[], Any]) -> None:
    """Write what ``make()`` returns as JSON and print how long it took, unless the file is there."""
    begun = time.monotonic()
    if not path.exists():
        write_text(path, json.dumps(make()) + "\n")
        print(f"{path.stem}: {time.monotonic() - begun:.0f} s", flush=True)
