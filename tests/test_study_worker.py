"""One cell in a process of its own: what it computes, and what happens when it fails."""

import errno
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tokenmdp.agents.ppo import PPO
from tokenmdp.runs.environments import make_envs, toy_policy
from tokenmdp.runs.settings import agent_config
from tokenmdp.study import results, worker
from tokenmdp.study.directory import declare, load_study
from tokenmdp.study.grid import expand
from tokenmdp.study.presets import PLANS
from tokenmdp.study.results import cell_file

SMOKE = PLANS["smoke"]


@pytest.fixture(autouse=True)
def threads():
    """A worker computes on one thread; the other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cell():
    return next(cell for cell in expand(SMOKE) if cell.method == "attention")


def test_a_cell_trains_as_the_agent_does_whatever_it_evaluates(cell):
    result = worker.run_cell(cell)
    agent = PPO(toy_policy(1), make_envs(cell.settings, 4, None), agent_config(cell.settings, 3)).learn(3)
    for name, column in result.metrics.items():
        assert column == [record[name] for record in agent.history], name
    assert set(worker.COLUMNS) | set(worker.REPORTED) == set(result.metrics)
    assert result.evaluations["update"] == [0, 2, 3]
    assert {len(column) for column in result.evaluations.values()} == {3}
    assert result.evaluations["kl"][0] == pytest.approx(0, abs=1e-5)
    assert len(result.samples) == 8
    assert 0 < result.costs["update_seconds"] < result.seconds
    assert result.costs["peak_bytes"] > 1e7
    assert worker.run_cell(cell).evaluations == result.evaluations


def test_an_evaluation_at_the_end_is_made_once(cell):
    assert worker.run_cell(replace(cell, updates=2)).evaluations["update"] == [0, 2]


def test_the_worker_writes_the_result_and_nothing_else(tmp_path, cell):
    declare(tmp_path, "smoke", [cell], {})
    assert worker.main([str(tmp_path), cell.id]) == 0
    assert torch.get_num_threads() == 1
    assert [path.name for path in (tmp_path / "cells").iterdir()] == [f"{cell.id}.json"]
    assert load_study(tmp_path).results[cell.id].cell == cell


def test_a_crash_leaves_its_trace_until_the_cell_succeeds(tmp_path, cell, monkeypatch, capsys):
    declare(tmp_path, "smoke", [cell], {})
    monkeypatch.setattr(worker, "run_cell", lambda *arguments: 1 / 0)
    assert worker.main([str(tmp_path), cell.id]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert load_study(tmp_path).errors == {cell.id: "ZeroDivisionError: division by zero"}
    monkeypatch.undo()
    assert worker.main([str(tmp_path), cell.id]) == 0
    assert load_study(tmp_path).errors == {}


def test_a_full_disk_is_a_failure_that_says_so(tmp_path, cell, monkeypatch, capsys):
    declare(tmp_path, "smoke", [cell], {})

    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(results, "write_text", full)
    monkeypatch.setattr(worker, "write_text", full)
    monkeypatch.setattr(worker, "run_cell", lambda *arguments: pytest.fail("it trained for nothing"))
    assert worker.main([str(tmp_path), cell.id]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not cell_file(tmp_path, cell.id).exists()
    assert not list(tmp_path.glob("cells/*"))


def test_an_orphan_stops_and_its_cell_is_not_called_failed(tmp_path, cell, monkeypatch, capsys):
    declare(tmp_path, "smoke", [cell], {})
    parents = iter([1, 1, 1, 2])
    monkeypatch.setattr(worker.os, "getppid", lambda: next(parents))
    assert worker.main([str(tmp_path), cell.id]) == 130
    assert next(parents, None) is None
    assert capsys.readouterr().err == f"{cell.id} was stopped: process 1 is gone\n"
    assert not list((tmp_path / "cells").iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="a process does not learn there that its parent is gone")
def test_one_whose_parent_ended_before_it_began_trains_nothing(tmp_path, cell, monkeypatch):
    declare(tmp_path, "smoke", [cell], {})
    monkeypatch.setattr(worker, "run_cell", lambda *arguments: pytest.fail("it trained"))
    assert worker.main([str(tmp_path), cell.id, "--parent", str(os.getpid())]) == 130


def test_a_study_that_is_moved_away_is_not_made_anew(tmp_path, cell, monkeypatch):
    study, moved = tmp_path / "study", tmp_path / "moved"
    declare(study, "smoke", [cell], {})
    run_cell = worker.run_cell

    def move_first(*arguments):
        study.rename(moved)
        return run_cell(*arguments)

    monkeypatch.setattr(worker, "run_cell", move_first)
    assert worker.main([str(study), cell.id]) == 130
    assert not study.exists()


def test_a_trace_names_no_directory_of_this_machine(tmp_path, cell, monkeypatch):
    declare(tmp_path, "smoke", [cell], {})
    monkeypatch.setattr(worker, "make_envs", lambda *arguments: (tmp_path / "model" / "config.json").read_text())
    assert worker.main([str(tmp_path), cell.id]) == 1
    trace = cell_file(tmp_path, cell.id, ".error.txt").read_text()
    assert "No such file or directory: 'config.json'" in trace
    assert "worker.py" in trace
    assert str(tmp_path) not in trace
    assert str(Path(worker.__file__).parent) not in trace
