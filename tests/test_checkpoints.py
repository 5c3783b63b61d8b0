"""Files that others can read, and errors that name the file."""

import json
import os
import stat

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tokenmdp.files import (
    CheckpointError,
    atomic_directory,
    load_state,
    recover_directory,
    save_state,
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
