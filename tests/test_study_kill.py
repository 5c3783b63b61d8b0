"""A study that is killed with SIGKILL ends, after the same command again, as an unbroken one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tokenmdp import cli
from tokenmdp.study import worker

UPDATES = 60
OPTIONS = [
    "--preset", "smoke", "--methods", "sparse", "attention", "uniform", "--seeds", "1", "--updates", str(UPDATES),
    "--eval-every", "30", "--jobs", "2", "--device", "cpu",
]  # fmt: skip
PATIENCE = 300  # seconds, for a machine that does much else


def start(out):
    command = [sys.executable, "-m", "tokenmdp.cli", "ablate", *OPTIONS, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def workers_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def contents(out):
    files = {path.name: json.loads(path.read_text()) for path in (out / "cells").iterdir()}
    return {name: {key: value for key, value in record.items() if key != "seconds"} for name, record in files.items()}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_a_killed_grid_ends_with_the_tables_of_an_unbroken_one(tmp_path, monkeypatch):
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    process = start(broken)
    try:
        running = wait_until(lambda: workers_of(process.pid) if len(workers_of(process.pid)) == 2 else [])
        wait_until(lambda: list(broken.glob("cells/*.progress")))
    finally:
        process.kill()
        process.communicate()
    os.kill(running[0], signal.SIGKILL)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in running))  # the orphan ends by itself
    finished = len(list(broken.glob("cells/*.json")))
    assert finished < 3

    again = start(broken)
    output, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, output
    assert output.count(" finished (") == 3 - finished

    # The unbroken one computes its cells in this process, one after the other, and only reports.
    threads = torch.get_num_threads()
    unbroken.mkdir()
    (unbroken / "study.json").write_text((broken / "study.json").read_text())
    ids = list(json.loads((unbroken / "study.json").read_text())["cells"])
    assert [worker.main([str(unbroken), id]) for id in ids] == [0, 0, 0]
    torch.set_num_threads(threads)
    assert cli.main(["ablate", *OPTIONS, "--out", str(unbroken), "--report-only"]) == 0

    assert contents(broken) == contents(unbroken)
    for name in ("tables.md", "verdicts.json"):
        assert (broken / "report" / name).read_text() == (unbroken / "report" / name).read_text()
