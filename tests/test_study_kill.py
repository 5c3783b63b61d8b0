"""A study that is killed with SIGKILL ends, after the same command again, as an unbroken one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import needs_fork, started
from study_doubles import figures_not_drawn

from tokenmdp import cli
from tokenmdp.study import scheduler, worker

UPDATES = 16
OPTIONS = [
    "--preset", "smoke", "--methods", "sparse", "attention", "uniform", "--seeds", "1", "--updates", str(UPDATES),
    "--eval-every", "8", "--jobs", "2", "--device", "cpu",
]  # fmt: skip
PATIENCE = 300  # seconds, for a busy machine


class Forked:
    """What `subprocess.Popen` would be of the worker, in a copy of this process."""

    def __init__(self, command, **_):
        assert command[1:3] == ["-m", "tokenmdp.study.worker"]
        self.process = started(lambda: sys.exit(worker.main(command[3:])))

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)


def fork_workers(real=0):
    """Let the scheduler copy this process for its workers, after so many ``real`` ones."""
    kinds = iter([subprocess.Popen] * real)
    popen = lambda command, **options: next(kinds, Forked)(command, **options)  # noqa: E731
    scheduler.subprocess = SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL)


def ablate_with_forked_workers(out):
    fork_workers()
    cli.main(["ablate", *OPTIONS, "--out", str(out)])


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def workers_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    """Whether the process runs: one that ended stays in /proc until its parent asks how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def under_way(out):
    """Cells that have finished some updates but not all."""
    found = []
    for file in out.glob("cells/*.progress"):
        try:
            done = json.loads(file.read_text()).get("update", 0)
        except FileNotFoundError:  # the cell has ended
            continue
        found += [file.stem] * (0 < done < UPDATES)
    return found


def times(out):
    return {file.name: file.stat().st_mtime_ns for file in out.glob("cells/*.json")}


def contents(out):
    files = {path.name: json.loads(path.read_text()) for path in out.glob("cells/*.json")}
    took = {"seconds", "costs"}
    return {name: {key: value for key, value in record.items() if key not in took} for name, record in files.items()}


@pytest.mark.slow
@needs_fork  # and the workers are found in /proc
@figures_not_drawn()
def test_a_killed_grid_ends_with_the_tables_of_an_unbroken_one(tmp_path, capsys, monkeypatch):
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    process = started(ablate_with_forked_workers, broken)
    try:
        running = wait_until(lambda: times(broken) and under_way(broken) and workers_of(process.pid))
    finally:
        process.kill()
        process.join()
    with contextlib.suppress(ProcessLookupError):  # it may just have ended
        os.kill(running[0], signal.SIGKILL)
    wait_until(lambda: not any(map(alive, running)))  # another orphan ends by itself
    for file in (broken / "cells").glob(".*"):  # half-written; old ones are removed
        os.utime(file, (0, 0))
    finished = times(broken)
    assert 0 < len(finished) < 3

    monkeypatch.setattr(scheduler, "subprocess", subprocess)  # to be put back
    fork_workers(real=1)
    assert cli.main(["ablate", *OPTIONS, "--out", str(broken)]) == 0
    assert capsys.readouterr().out.count(" finished (") == 3 - len(finished)
    assert finished.items() <= times(broken).items()  # what was finished was not touched
    assert {file.suffix for file in (broken / "cells").iterdir()} == {".json"}  # no half-written file is left

    # The unbroken one computes its cells in this process, one after the other, and only reports.
    threads = torch.get_num_threads()
    unbroken.mkdir()
    (unbroken / "study.json").write_text((broken / "study.json").read_text())
    ids = list(json.loads((unbroken / "study.json").read_text())["cells"])
    assert [worker.main([str(unbroken), id]) for id in ids] == [0, 0, 0]
    torch.set_num_threads(threads)
    assert cli.main(["ablate", *OPTIONS, "--out", str(unbroken), "--report-only"]) == 0

    assert contents(broken) == contents(unbroken)
    assert (broken / "report" / "tables.md").read_text() == (unbroken / "report" / "tables.md").read_text()
