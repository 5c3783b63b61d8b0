"""Files that others can read, and errors that name the file."""

import json
import os
import shutil
import stat
import subprocess

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tokenmdp.files import (
    DIGESTS,
    CheckpointError,
    atomic_directory,
    check_digests,
    load_state,
    recover_directory,
    save_state,
    write_digests,
    write_text,
)

STATE = {"step": 3, "rates": [0.1, 1e-300], "state": {0: {"moment": torch.arange(3.0)}, 7: None}, "name": "ä"}


def test_nested_state_comes_back_with_integer_keys(tmp_path):
    save_state(tmp_path / "deep" / "state.safetensors", STATE)
    loaded = load_state(tmp_path / "deep" / "state.safetensors")
    assert torch.equal(loaded["state"][0].pop("moment"), torch.arange(3.0))
    assert loaded == {"step": 3, "rates": [0.1, 1e-300], "state": {0: {}, 7: None}, "name": "ä"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "without saved state"),
        ({"state": "{"}, "without saved state"),
        ({"state": json.dumps({"__tensor__": "5"})}, "refers to '5', which is not there"),
        ({"state": json.dumps({"other": 1})}, "refers to '__dict__'"),
    ],
)
def test_a_foreign_or_damaged_state_is_named(tmp_path, metadata, message):
    file = tmp_path / "state.safetensors"
    save_file({"0": torch.zeros(1)}, file, metadata=metadata)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_state(file)
    assert str(file) in str(raised.value)


def test_other_users_can_read_what_is_written(tmp_path):
    write_text(tmp_path / "note.json", "{}")
    with atomic_directory(tmp_path / "run") as new:
        write_text(new / "config.json", "{}")
    for path, mode in (("note.json", 0o644), ("run", 0o755), ("run/config.json", 0o644)):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == mode


@pytest.mark.parametrize(
    ("error", "raised"), [(SafetensorError("no space left"), OSError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_an_error_inside_the_block_leaves_the_old_directory(tmp_path, error, raised):
    (tmp_path / "run").mkdir()
    write_text(tmp_path / "run" / "old", "whole")

    def save():
        with atomic_directory(tmp_path / "run") as new:
            write_text(new / "half", "")
            raise error

    with pytest.raises(raised):
        save()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["run", "run/old"]


def test_a_crash_between_the_two_renames_is_recovered(tmp_path):
    (tmp_path / "run").mkdir()
    write_text(tmp_path / "run" / "old", "whole")
    os.replace(tmp_path / "run", tmp_path / "run.previous")  # what the first of the two renames leaves
    assert (recover_directory(tmp_path / "run") / "old").read_text() == "whole"
    assert not (tmp_path / "run.previous").exists()


@pytest.fixture
def synced(monkeypatch):
    """What reaches the disk, in order: synced files and directories, and renames."""
    done = []
    fsync, replace = os.fsync, os.replace

    def record_sync(handle):
        done.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def record_replace(source, target):
        done.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    return done


linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads the names of open files from /proc")


@linux
def test_a_directory_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, synced):
    (tmp_path / "run").mkdir()
    with atomic_directory(tmp_path / "run") as new:
        (new / "deep" / "er").mkdir(parents=True)
        for name in ("weights", "deep/er/state"):
            (new / name).write_text("content")  # as other libraries write: nothing is synced
    swap = synced.index(("rename", "run.previous"))
    before, after = {name for what, name in synced[:swap] if what == "sync"}, synced[swap:]
    assert before >= {"weights", "state", "deep", "er"}
    assert after == [("rename", "run.previous"), ("rename", "run"), ("sync", tmp_path.name)]


@linux
@pytest.mark.parametrize("write", [lambda path: write_text(path, "{}"), lambda path: save_state(path, STATE)])
def test_a_file_and_the_folders_made_for_it_are_on_the_disk(tmp_path, synced, write):
    write(tmp_path / "new" / "folder" / "file")
    names = [name for what, name in synced if what == "sync"]
    assert names[:2] == ["new", tmp_path.name]  # which hold the entries of the new folders
    assert names[-1] == "folder"
    assert synced[-2] == ("rename", "file")
    assert len(names) == 4


def flip(path, place=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["weights.bin", "state/history.json", "state/deep/more"])
@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(b""), os.unlink])
def test_digests_see_every_change(tmp_path, name, damage):
    for file in ("weights.bin", "state/history.json", "state/deep/more"):
        write_text(tmp_path / file, f"content of {file}")
    assert not check_digests(tmp_path)
    write_digests(tmp_path)
    assert check_digests(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}.* restore a copy"):
        check_digests(tmp_path)
    if "/" in name:
        assert check_digests(tmp_path, below=False)


def test_sha256sum_reads_the_digests(tmp_path):
    if shutil.which("sha256sum") is None:
        pytest.skip("needs the program sha256sum")
    write_text(tmp_path / "a b.txt", "content")
    write_digests(tmp_path)
    assert subprocess.run(["sha256sum", "-c", DIGESTS], cwd=tmp_path, check=False).returncode == 0
