"""One process at a time in a directory."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for the directory ``path``.

    Where directories cannot be locked (Windows, some network file systems) nothing waits, and of two writers the last
    one wins.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    directory = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(directory, fcntl.LOCK_EX)  # a killed process lets go of it
        yield
    finally:
        os.close(directory)
