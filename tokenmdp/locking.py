"""One process at a time in a directory."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


class BusyError(OSError):
    """Another process holds the directory."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the directory ``path`` for the block, which no other process can do meanwhile.

    Where directories cannot be locked (Windows, some network file systems) nothing is held, and of two writers the last
    one wins.

    Args:
        path: of a directory that is there.
        wait: until another process lets go of it; a killed one does so.

    Raises:
        BusyError: another process holds it, without ``wait``.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    directory = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BusyError(f"another process holds {path}; wait until it ends") from error
        except OSError:  # no locks here
            pass
        yield
    finally:
        os.close(directory)
