"""Signals, closed pipes, terminals of little skill, and paths with control characters."""

import errno
import io
import json
import os
import select
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
from doubles import TOY
from forked import Command, needs_fork
from test_behaviours_command import STEMS

from tokenmdp.cli import main
from tokenmdp.runs import display
from tokenmdp.runs.display import MessageConsole
from tokenmdp.wording import visible

pytestmark = pytest.mark.usefixtures("curves_not_drawn")

SMOKE = ["train", "--preset", "smoke", "--num-envs", "8", "--eval-samples", "8", "--no-reexec"]


def updates_of(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def train(out, updates, until, **options):
    """The command that trains, as soon as it has finished ``until`` updates."""
    run = Command(*SMOKE, "--updates", str(updates), "--out", str(out), **options)
    while updates_of(out / "metrics.jsonl") < until and run.runs:
        time.sleep(0.02)
    return run


def updates_saved(out):
    return len(json.loads((out / "checkpoint" / "state" / "history.json").read_text()))


@needs_fork
def test_the_end_of_the_terminal_saves(tmp_path):
    run = train(tmp_path, 2000, until=2)
    run.send(signal.SIGHUP)
    status, said = run.end()
    assert status == 130, said
    assert "Traceback" not in said
    assert updates_saved(tmp_path) == updates_of(tmp_path / "metrics.jsonl") >= 2


@needs_fork
@pytest.mark.parametrize(("name", "number"), [("prefer", signal.SIGTERM), ("behaviours", signal.SIGHUP)])
def test_commands_without_updates_end_in_one_line(name, number, tmp_path, monkeypatch):
    """The signal comes while the first file is written: nothing half-written is left."""
    monkeypatch.setattr("os.fsync", lambda handle: os.kill(os.getpid(), number))
    stems = tmp_path / "stems.json"
    stems.write_text(json.dumps(STEMS))
    out = tmp_path / "new" / "out.jsonl"
    commands = {
        "prefer": ["prefer", "--judge", "lexicon", "--pairs", "2"],
        "behaviours": [
            "behaviours",
            "write",
            "--stems",
            str(stems),
            "--judge",
            "lexicon",
            "--second-judge",
            "restraint",
        ],
    }
    status, said = Command(*commands[name], "--out", str(out)).end()
    assert status == 130, said
    assert said.splitlines()[-1] == "interrupted; run the same command to go on"
    assert "Traceback" not in said
    assert not [file.name for file in out.parent.glob("*") if file.name.startswith(".")]


def test_a_full_disk_is_named_with_the_file_and_the_remedy(tmp_path, monkeypatch, capsys):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = ["prefer", "--judge", "lexicon", "--pairs", "2", "--out", str(tmp_path / "a.jsonl")]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(command) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"No space left on device: '{tmp_path / 'a.run.json'}'; make room, then run the same command again" in said
    assert main(command) == 0


@needs_fork
def test_nohup_overrules_the_end_of_the_terminal(tmp_path):
    run = train(tmp_path, 3, until=1, before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    run.send(signal.SIGHUP)
    status, said = run.end()
    assert status == 0, said
    assert updates_of(tmp_path / "metrics.jsonl") == 3


@needs_fork
def test_training_saves_before_a_closed_pipe_ends_it(tmp_path):
    run = train(tmp_path, 2000, until=1, before=lambda: setattr(display, "LOG_SECONDS", 0))  # a line for each update
    run.stdout.close()
    status, said = run.end()
    assert status == 141, said
    assert "Traceback" not in said
    assert "BrokenPipe" not in said
    assert updates_saved(tmp_path) == updates_of(tmp_path / "metrics.jsonl") >= 1


def until_nobody_reads():
    poll = select.poll()
    poll.register(1, 0)  # errors are reported always
    poll.poll(60_000)


@needs_fork
def test_a_closed_pipe_ends_a_command_quietly():
    run = Command("credits", before=until_nobody_reads)
    run.stdout.close()
    assert run.end() == (141, "")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_closed_pipe_ends_the_interpreter_quietly():
    reader, writer = os.pipe()
    os.close(reader)  # nobody reads
    run = subprocess.Popen([sys.executable, "-m", "tokenmdp", "--help"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    said = run.communicate(timeout=120)[1].decode()
    assert (run.returncode, said) == (141, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_terminals_that_lack_characters(encoding, monkeypatch):
    for text, status in (("a good film, naïve ↵ 映画", 0), ("\udcff", 2)):
        written = {name: io.BytesIO() for name in ("stdout", "stderr")}
        for name, raw in written.items():
            monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding=encoding, write_through=True))
        assert main(["score", text, "--reward-model", "imdb-tiny"]) == status
        said = [raw.getvalue().decode(encoding) for raw in written.values()]
        assert said[status == 2]
        assert "Traceback" not in said[1]


@pytest.mark.parametrize("name", ["a\x1b[31mred", "bell\x07", "two\nlines\x9b2J"])
def test_control_characters_of_a_path_are_shown(name, tmp_path, capsys):
    assert main([*SMOKE, "--updates", "1", "--out", str(tmp_path / "run"), "--policy", f"./{name}"]) == 2
    said = capsys.readouterr().err
    assert not {"\x1b", "\x07", "\x9b"} & set(said)
    assert "no such directory" in said
    MessageConsole(markup=False).print(f"run directory: {tmp_path}/{name}")
    assert not {"\x1b", "\x07", "\x9b"} & set(capsys.readouterr().out)


def test_visible_keeps_what_can_be_read():
    assert visible("naïve 映画\n\ttab \x00\ud800") == "naïve 映画\n\ttab \\x00\\ud800"


BAD_RESETS = [
    {"seed": [7, 8, -1]}, {"seed": [7, "8", 9]}, {"seed": [1.5, 2, 3]}, {"seed": -1}, {"seed": "7"}, {"seed": [1, 2]},
    {"options": "x"}, {"options": ["prompt"]}, {"options": 3},
    {"seed": [4, 5, 6], "options": {"prompt": [None, "a", 7]}},
]  # fmt: skip


@pytest.mark.parametrize("arguments", BAD_RESETS, ids=str)
def test_a_refused_reset_changes_no_row(arguments):
    envs = gym.make_vec(TOY, num_envs=3)
    envs.reset(seed=0)
    envs.step(np.array([1, 2, 3]))
    before, text = envs.unwrapped.get_rng_state(), envs.unwrapped._observe()["input_ids"]
    with pytest.raises((gym.error.Error, ValueError)):
        envs.reset(**arguments)
    assert envs.unwrapped.get_rng_state() == before
    assert (envs.unwrapped._observe()["input_ids"] == text).all()


@pytest.mark.parametrize("options", ["x", ["prompt"], 3])
def test_options_of_a_single_environment(options):
    env = gym.make(TOY, disable_env_checker=True).unwrapped
    with pytest.raises(ValueError, match=r"options is .* pass a dictionary"):
        env.reset(options=options)


def test_the_clock_may_be_set_back(monkeypatch):
    pytest.importorskip("sb3_contrib")
    from tokenmdp.interop.sb3 import GymVectorToSB3

    venv = GymVectorToSB3(gym.make_vec(TOY, num_envs=1, autoreset_mode="SameStep"))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    venv.reset()
    infos = venv.step(np.array([venv.envs.unwrapped.eos_token_id]))[3]
    assert infos[0]["episode"]["t"] >= 0


@pytest.mark.parametrize("directory", [".", "./", "/", "..", "", " ", "~nobody-of-this-name/x"])
def test_directories_without_a_name(directory, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["score", "a good film", "--reward-model", directory]) == 2
    said = capsys.readouterr().err
    assert "empty name" not in said
    assert any(part in said for part in ("cannot load", "is empty", "home directory", "no config", "holds no"))


def test_the_current_directory_may_be_a_model(monkeypatch, capsys):
    from tokenmdp.models.names import resolve

    monkeypatch.chdir(resolve("reward_model", "imdb-tiny"))
    for name in (".", "./", "../reward_model"):
        assert main(["score", "a good film", "--reward-model", name]) == 0
    assert "score" in capsys.readouterr().out
