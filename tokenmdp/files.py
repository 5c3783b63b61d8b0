"""Files that survive an interruption and a power cut: atomic writes, state without pickle, digests, and locks."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or was written by something else; the message names the file and the remedy."""


class BusyError(OSError):
    """Another process holds the directory."""


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees the old file or the new one, never half of it.

    >>> import tempfile, pathlib
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "note.txt"
    >>> write_text(target, "whole"); target.read_text()
    'whole'
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """`write_text` for bytes."""
    path = Path(path)
    make_directory(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes 0600: other users could not read it
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # "No space left on device" does not say where
            error.filename = str(path)
        raise


def sync(path: str | Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk and survives a power cut."""
    if sys.platform == "win32" and Path(path).is_dir():
        return  # directories cannot be opened there
    handle = os.open(path, os.O_RDONLY if sys.platform != "win32" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems refuse to sync directories
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not Path(path).is_dir():
            raise
    finally:
        os.close(handle)


def sync_tree(path: str | Path) -> None:
    """`sync` every file and directory below ``path``, and itself last."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            sync(Path(folder) / name)
        sync(folder)


def make_directory(path: str | Path) -> None:
    """Make a directory and those above it, so that all of them survive a power cut; it may exist."""
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def read_json(path: str | Path) -> Any:
    """The content of a JSON file of a checkpoint.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; restore a copy, or start afresh elsewhere") from error


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty sibling directory that takes the place of ``path`` when the block ends without an error.

    An error or Ctrl-C inside the block leaves the previous ``path`` untouched. The swap is two renames; a crash
    between them leaves the old version as ``path.previous``, which `recover_directory` puts back. All files are on the
    disk before the swap, and the swap before the old version goes, so that a power cut leaves one of the two whole.

    Raises:
        OSError: something could not be written (safetensors' own error for that is turned into one), or ``path`` is
            "." or "/".
    """
    path = Path(path)
    if path.name in ("", ".."):  # a directory that is swapped would be taken from under the feet of who stands in it
        raise OSError(f"{str(path)!r} is where you are, or above it; give the new directory a name of its own")
    make_directory(path.parent)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    previous = path.with_name(path.name + ".previous")
    try:
        try:
            yield temporary
        except SafetensorError as error:  # a full disk
            raise OSError(str(error)) from error
        temporary.chmod(0o755)  # mkdtemp makes 0700: other users could not read the checkpoint
        sync_tree(temporary)
        shutil.rmtree(previous, ignore_errors=True)
        if path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        sync(path.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        recover_directory(path)
        raise


def recover_directory(path: str | Path) -> Path:
    """Put back ``path.previous`` if a crash between the two renames of `atomic_directory` left only that."""
    path = Path(path)
    if path.exists():  # "." and "/" always do; they have no name to put ".previous" behind
        return path
    previous = path.with_name(path.name + ".previous")
    if previous.exists():
        os.replace(previous, path)
    return path


def expand_home(name: str) -> Path:
    """A path with ``~`` and ``~user`` written out.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name}: there is no home directory of that user; write the path out") from error


def save_state(path: str | Path, state: Any) -> None:
    """Save nested dicts and lists of tensors and JSON values as one safetensors file, atomically.

    The nesting is JSON in the file's metadata; every tensor leaf becomes ``{"__tensor__": index}``.
    """
    tensors: dict[str, torch.Tensor] = {}

    def pack(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            key = str(len(tensors))
            tensors[key] = value.detach().cpu().contiguous().clone()  # clone: safetensors refuses shared storage
            return {"__tensor__": key}
        if isinstance(value, dict):
            return {"__dict__": [[key, pack(item)] for key, item in value.items()]}  # pairs keep integer keys
        if isinstance(value, list | tuple):
            return [pack(item) for item in value]
        return value

    path = Path(path)
    make_directory(path.parent)
    metadata = {"state": json.dumps(pack(state))}
    temporary = path.with_name(f".{path.name}.partial")
    save_file(tensors, temporary, metadata=metadata)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def load_state(path: str | Path) -> Any:
    """Read what `save_state` wrote. Tensors come back on the CPU; tuples come back as lists.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no state.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; delete it to start afresh or restore a copy") from error
    try:
        packed = json.loads(metadata["state"])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is a safetensors file without saved state ({error!r}): was it written by another program?"
        ) from error

    def unpack(value: Any) -> Any:
        if isinstance(value, list):
            return [unpack(item) for item in value]
        if isinstance(value, dict):
            if "__tensor__" in value:
                return tensors[value["__tensor__"]]
            return {key: unpack(item) for key, item in value["__dict__"]}
        return value

    try:
        return unpack(packed)
    except KeyError as error:
        raise CheckpointError(f"{path} is damaged: its state refers to {error}, which is not there") from error


DIGESTS = "state/sha256sums.txt"  # of a checkpoint; `sha256sum -c state/sha256sums.txt` reads it too


def write_digests(directory: Path) -> None:
    """Write the SHA-256 of every file below ``directory`` to its `DIGESTS`."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / DIGESTS)
    lines = (f"{_digest(file)}  {file.relative_to(directory).as_posix()}\n" for file in files)
    write_text(directory / DIGESTS, "".join(lines))


def check_digests(directory: Path, *, below: bool = True, weights: bool = True) -> bool:
    """Compare the files of a directory with its `DIGESTS`.

    Args:
        directory: What `write_digests` was given, or any other.
        below: Also those in folders; else only its own.
        weights: Also safetensors files, which take the longest.

    Returns:
        False where there are no digests to compare with.

    Raises:
        CheckpointError: a file is missing, or has changed since.
    """
    place = directory / DIGESTS
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {place}: {error}; restore a copy of {directory}") from error
    if not lines:
        raise CheckpointError(f"{place} is empty: {directory} is damaged; restore a copy of it")
    for line in lines:
        digest, _, name = line.partition("  ")
        if (not below and "/" in name) or (not weights and name.endswith(".safetensors")):
            continue
        file = directory / name
        try:
            same = _digest(file) == digest
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error}; restore a copy of {directory}") from error
        if not same:
            raise CheckpointError(
                f"{file} is damaged: its SHA-256 is not the one it was saved with; restore a copy of {directory}, or "
                f"delete {place} if the file was changed on purpose"
            )
    return True


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the directory or file ``path`` for the block, which no other process can do meanwhile.

    Where they cannot be locked (Windows, some network file systems) nothing is held, and the last of two writers
    wins.

    Args:
        path: an existing directory, or a file that is not replaced meanwhile.
        wait: until another process releases it; a killed process does so too.

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
