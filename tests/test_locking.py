"""A directory that only one process at a time can hold."""

import errno
import os

import pytest

from tokenmdp.files import BusyError, locked

fcntl = pytest.importorskip("fcntl", reason="only Unix locks directories")


def test_the_directory_is_held_for_the_block_and_no_longer(tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    with locked(tmp_path), pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)


def test_who_does_not_wait_is_told(tmp_path):
    with locked(tmp_path), pytest.raises(BusyError, match="wait until it ends"), locked(tmp_path, wait=False):
        pytest.fail("two hold it")
    with pytest.raises(BlockingIOError), locked(tmp_path, wait=False):
        raise BlockingIOError  # raised by the block itself


def test_where_there_are_no_locks_nothing_is_held(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path, wait=False), locked(tmp_path):
        pass
