"""Threads follow what is free: affinity, quota and load; what the user chose stands; a resumed run keeps its own."""

import json
import os
import sys

import pytest
import torch

from tokenmdp.cli import main
from tokenmdp.runs import process_settings

pytestmark = pytest.mark.usefixtures("curves_not_drawn")

linux = pytest.mark.skipif(sys.platform != "linux", reason="affinity and control groups of Linux")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    def of(cores, load=0.0, **files):
        for name, content in files.items():
            path = tmp_path / name.replace("__", "/").replace("_max", ".max").replace("cpu_cfs", "cpu.cfs")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        monkeypatch.setattr(process_settings, "CGROUP", tmp_path)
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        monkeypatch.setattr(process_settings, "busy_now", lambda: load)
        monkeypatch.setattr(process_settings, "busy_beside", lambda: 0.0)
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))

    return of


@linux
@pytest.mark.parametrize(
    ("cores", "load", "files", "allowed", "free"),
    [
        (8, 0.1, {}, 8, 8),
        (8, 3.0, {}, 8, 5),
        (2, 1.1, {}, 2, 1),
        (2, 40.0, {}, 2, 1),
        (8, 0.0, {"cpu_max": "200000 100000\n"}, 2, 2),
        (8, 0.0, {"cpu_max": "max 100000\n"}, 8, 8),
        (8, 0.0, {"cpu_max": "50000 100000\n"}, 1, 1),
        (8, 0.0, {"cpu_max": "nonsense"}, 8, 8),
        (8, 1.0, {"cpu__cpu_cfs_quota_us": "400000\n", "cpu__cpu_cfs_period_us": "100000\n"}, 4, 4),
        (8, 6.0, {"cpu_max": "400000 100000\n"}, 4, 2),
        (8, 0.0, {"cpu__cpu_cfs_quota_us": "-1\n", "cpu__cpu_cfs_period_us": "100000\n"}, 8, 8),
    ],
)
def test_what_is_free(cores, load, files, allowed, free, machine):
    machine(cores, load, **files)
    assert (process_settings.allowed_cores(), process_settings.free_cores()) == (allowed, free)


@linux
def test_a_load_that_is_over_counts_no_more(machine, monkeypatch, tmp_path):
    machine(4, load=3.0)
    monkeypatch.setattr(process_settings, "busy_now", lambda: 0.2)
    assert process_settings.free_cores() == 4
    monkeypatch.undo()
    machine(4, load=3.0)
    monkeypatch.setattr(process_settings, "busy_now", lambda: 40.0)
    assert process_settings.free_cores() == 1


@linux
def test_the_share_of_busy_cores_is_read_from_the_system(monkeypatch, tmp_path):
    texts = iter(["cpu  100 0 0 100 0 0 0 0\n", "cpu  130 0 0 170 0 0 0 0\n"])  # 30 of 100 ticks

    class Stat:
        def read_text(self, encoding):
            return next(texts)

    monkeypatch.setattr(process_settings, "STAT", Stat())
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert process_settings.busy_now(0) == pytest.approx(3.0)
    monkeypatch.setattr(process_settings, "STAT", tmp_path / "nothing")
    assert process_settings.busy_now(0) == float("inf")


@linux
def test_who_decides(machine):
    machine(4, load=2.0)
    assert process_settings.thread_count({}, None)[0] == 2
    assert process_settings.thread_count({}, 3) == (3, "as when the run began")
    assert process_settings.thread_count({"OMP_NUM_THREADS": "4"}, 3) == (None, "as OMP_NUM_THREADS says")
    assert process_settings.thread_count({"MKL_NUM_THREADS": "4"}, None) == (None, "as MKL_NUM_THREADS says")
    machine(4, load=0.2)
    assert process_settings.thread_count({}, None) == (None, "")


def test_the_log_says_so_and_the_run_keeps_it(tmp_path, capsys, monkeypatch):
    for name in process_settings.THREADS_CHOSEN:
        monkeypatch.delenv(name, raising=False)
    run = ["train", "--preset", "smoke", "--num-envs", "8", "--eval-samples", "8", "--no-reexec", "--out"]
    assert main([*run, str(tmp_path / "run"), "--updates", "1"]) == 0
    assert "thread" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["threads"] >= 1
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"threads": 3}))
    before = torch.get_num_threads()
    try:
        assert main([*run, str(tmp_path / "run"), "--updates", "2"]) == 0
    finally:
        torch.set_num_threads(before)
    assert "3 threads (as when the run began)" in capsys.readouterr().out


def test_spinning_is_bounded():
    assert process_settings.SETTINGS["GOMP_SPINCOUNT"] == "10000"


@linux
def test_what_began_together_with_this_process_is_seen(machine, monkeypatch):
    """Two runs at once: the load of the last minute is still 0."""
    busy_beside = process_settings.busy_beside
    machine(4)

    def starts(busy, seconds=3.0):  # ticks of four cores in `seconds`, of which `busy` were used, 1.0 by this process
        began = process_settings.Start((1000, 600), 0.5, 10.0)
        passed = (1000 + int(400 * seconds), 600 + int((4 - busy) * 100 * seconds))
        ended = process_settings.Start(passed, 0.5 + seconds, 10 + seconds)
        monkeypatch.setattr(process_settings.Start, "now", lambda: ended)
        return busy_beside(began)

    assert starts(2.0) == pytest.approx(1.0)
    assert starts(1.0) == pytest.approx(0.0)
    assert starts(4.0, seconds=0.5) == starts(4.0, seconds=90) == 0
    assert busy_beside(None) == 0
    monkeypatch.setattr(process_settings, "busy_beside", lambda: 1.0)
    assert process_settings.free_cores() == 3
