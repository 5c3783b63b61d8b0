"""Runs of two gloo processes against the same runs of one."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from datetime import timedelta

import gloo_runs
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from data_doubles import saved
from forked import Command, needs_fork
from gymnasium.error import DependencyNotInstalled
from rich.console import Console
from safetensors.torch import load_file

from tokenmdp import cli
from tokenmdp.agents import learner
from tokenmdp.agents.ppo import PPO
from tokenmdp.files import load_state
from tokenmdp.report.curves import read_metrics
from tokenmdp.runs import display, training
from tokenmdp.runs.environments import toy_policy
from tokenmdp.training import checkpoint
from tokenmdp.training.accelerated import Accelerated, launched
from tokenmdp.training.processes import Processes


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The files that the two processes leave behind."""
    path = tmp_path_factory.mktemp("gloo")
    gloo_runs.make_agent("uniform").learn(2).save(path / "saved by one")
    saved(toy_policy(seed=0), path / "start")
    gloo_runs.in_two_processes(path)
    return path


@pytest.fixture(scope="module")
def alone():
    """The same runs in this process, each played once."""
    played = {}

    def play(name):
        if name not in played:
            played[name] = gloo_runs.record(gloo_runs.make_agent(name).learn(gloo_runs.UPDATES))
        return played[name]

    return play


def assert_same(run, expected, tolerance=1e-4):
    assert [set(metrics) for metrics in run["history"]] == [set(metrics) for metrics in expected["history"]]
    for metrics, wanted in zip(run["history"], expected["history"], strict=True):
        assert metrics == pytest.approx(wanted, rel=0, abs=tolerance)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(run["weights"][name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", gloo_runs.RUNS)
def test_two_processes_learn_what_one_learns(directory, alone, name):
    first, second = (load_state(directory / f"{name} {rank}.safetensors") for rank in (0, 1))
    assert_same(first, alone(name))
    assert len(first["history"]) == gloo_runs.UPDATES
    assert first["history"] == second["history"]  # not a bit of difference: both take the same decisions
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())


@pytest.mark.parametrize("name", gloo_runs.FROM_DATA)
def test_two_processes_learn_from_data_what_one_learns(directory, name):
    first, second = (load_state(directory / f"{name} {rank}.safetensors") for rank in (0, 1))
    alone = gloo_runs.make_learner(name, directory / "start").learn(gloo_runs.UPDATES)
    assert_same(first, gloo_runs.record(alone))
    assert alone.history[0]["loss"] != pytest.approx(alone.history[-1]["loss"], abs=1e-3)
    assert first["history"] == second["history"]
    assert all(torch.equal(weight, second["weights"][key]) for key, weight in first["weights"].items())


def test_the_runs_put_to_the_test_what_they_are_for(alone):
    lengths = {metrics["response_length"] for metrics in alone("uniform")["history"]}
    assert all(length < 8 for length in lengths)  # so the texts are not all of one length
    assert len({metrics["kl_coef"] for metrics in alone("attention")["history"]}) == gloo_runs.UPDATES
    assert any(metrics["minibatches"] < 10 for metrics in alone("target_kl")["history"])
    assert all(metrics["attention_mass"] > 0 for metrics in alone("attention")["history"])


@pytest.mark.parametrize("name", gloo_runs.SHARDED)
@pytest.mark.parametrize("suffix", ["sharded", "sharded, resumed"])
def test_sharded_weights_learn_the_same(directory, alone, name, suffix):
    assert_same(load_state(directory / f"{name}, {suffix} 0.safetensors"), alone(name))


@pytest.mark.parametrize("name", gloo_runs.SHARDED)
def test_sharded_each_process_keeps_half_of_the_numbers(directory, name):
    whole = gloo_runs.numbers_held(gloo_runs.make_agent(name).learn(1))
    parts = [load_state(directory / f"{name}, shards {rank}.safetensors")["numbers"] for rank in (0, 1)]
    assert sum(parts) == whole
    assert max(parts) < 0.55 * whole


@pytest.mark.parametrize("title", ["one, then two", "one, then sharded"])
def test_a_run_of_one_process_goes_on_in_two(directory, alone, title):
    assert_same(load_state(directory / f"{title} 0.safetensors"), alone("uniform"))


@pytest.mark.parametrize(
    ("title", "name"),
    [("saved by two", "uniform"), *((f"{name}, saved sharded", name) for name in gloo_runs.SHARDED)],
)
def test_a_run_of_two_processes_goes_on_in_one(directory, alone, title, name):
    agent = gloo_runs.resume(directory / title, name)
    assert agent.num_updates_done == 2
    assert_same(gloo_runs.record(agent.learn(gloo_runs.UPDATES - 2)), alone(name))


@pytest.mark.parametrize("title", ["saved by two", "uniform, saved sharded"])
def test_checkpoints_are_the_same_files_whatever_the_number_of_processes(directory, title):
    def contents(path):
        files = [file for file in path.rglob("*") if file.is_file()]
        return {
            str(file.relative_to(path)): {name: tensor.shape for name, tensor in load_file(file).items()}
            if file.suffix == ".safetensors"
            else None
            for file in files
        }

    assert contents(directory / title) == contents(directory / "saved by one")


def test_an_error_in_one_process_ends_both(directory):
    first, second = (load_state(directory / f"failures {rank}.safetensors") for rank in (0, 1))
    assert second["error"] == ["ZeroDivisionError", "no reward today"]
    assert first["error"] == ["OtherProcessFailed", "process 1 of 2 failed: ZeroDivisionError: no reward today"]
    for trouble in ("nan value", "nan logits"):
        assert first[trouble][0] in ("FloatingPointError", "OtherProcessFailed")
        assert second[trouble] is not None
        assert "nan" in second[trouble][1].lower() or "NaN" in first[trouble][1]


def launched_environments(directory):
    """What accelerate's launcher adds to the environment of each of two processes."""
    (directory / "tell.py").write_text(
        "import json, os\nopen('rank' + os.environ['RANK'], 'w').write(json.dumps(dict(os.environ)))"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "tell"]
    done = subprocess.run(launch, cwd=directory, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = [json.loads((directory / f"rank{rank}").read_text()) for rank in (0, 1)]
    return [{name: one[name] for name in one if one[name] != os.environ.get(name)} for one in told]


@needs_fork
def test_the_command_gives_two_processes_one_run(tmp_path):
    """In the environment that accelerate's launcher gives, then continued by one process; against one all the way."""
    options = ["--preset", "smoke", "--num-envs", "4", "--eval-samples", "6", "--device", "cpu", "--lora-rank", "2"]
    options += ["--dtype", "float32", "--adam-eps", "1e-5", "--learning-rate", "1e-3"]
    two, one = (["--out", str(tmp_path / name), "--updates"] for name in ("two", "one"))
    environments = launched_environments(tmp_path)
    assert [(one["RANK"], one["WORLD_SIZE"]) for one in environments] == [("0", "2"), ("1", "2")]
    # The launcher itself, where they would meet, has ended.
    meeting = {"MASTER_PORT": str(gloo_runs.free_port()), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    runs = [
        Command("train", *options, *two, "1", before=functools.partial(os.environ.update, environment | meeting))
        for environment in environments
    ]
    (first, said), (second, silent) = [run.end() for run in runs]
    assert (first, second) == (0, 0), said + silent
    assert (said + silent).count("run directory: ") == 1  # one of them talks
    assert "2 processes with 2 episodes each" in said
    assert cli.main(["train", *options, *two, "2"]) == 0
    assert cli.main(["train", *options, *one, "2"]) == 0
    assert cli.main(["eval", str(tmp_path / "two"), "--samples", "4", "--device", "cpu"]) == 0
    runs = [read_metrics(tmp_path / out / "metrics.jsonl") for out in ("two", "one")]
    assert [metrics["update"] for metrics in runs[0]] == [1, 2]
    for metrics, expected in zip(*runs, strict=True):
        timeless = {key: value for key, value in expected.items() if key not in gloo_runs.UNTIMED}
        assert {key: metrics[key] for key in timeless} == pytest.approx(timeless, rel=0, abs=1e-4)


def test_one_process_needs_no_accelerate(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert launched("cpu") is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DependencyNotInstalled, match=r"WORLD_SIZE=2 .* pip install 'tokenmdp\[accelerate\]'"):
        launched("cpu")


def test_the_others_wait_for_an_evaluation_of_hours(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.Accelerator", lambda **options: options["kwargs_handlers"])
    waits = [handler.timeout for handler in launched("cpu") if isinstance(handler, InitProcessGroupKwargs)]
    assert len(waits) == 1
    assert waits[0] >= timedelta(hours=12)


class Second(Processes):
    """Process 1 of 2, whose other one is played by hand."""

    rank, size = 1, 2


def test_processes_with_different_numbers_of_rows_are_refused(monkeypatch):
    monkeypatch.setattr(Second, "gather", lambda self, value: [6, value])
    monkeypatch.setattr(learner, "processes_of", lambda accelerator: Second())
    with pytest.raises(ValueError, match=r"num_envs is \[6, 8\] in the 2 processes; all must play the same number"):
        gloo_runs.make_agent("uniform")


def test_the_first_process_alone_puts_a_checkpoint_back(tmp_path, monkeypatch):
    gloo_runs.make_agent("uniform").save(tmp_path / "run")
    previous = (tmp_path / "run").rename(tmp_path / "run.previous")

    @contextlib.contextmanager
    def raise_together(self):
        yield
        assert previous.exists()  # what the other process is renaming
        previous.rename(tmp_path / "run")

    monkeypatch.setattr(Second, "raise_together", raise_together)
    assert checkpoint.read(tmp_path / "run", PPO.format, Second()).path == tmp_path / "run"
    (tmp_path / "run").rename(previous)
    assert checkpoint.read(tmp_path / "run", PPO.format).path == tmp_path / "run"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_that_a_launcher_repeats_are_overlooked_for_a_while(monkeypatch, number):
    clock = iter((100.0, 100.0, 101.5, 102.5))
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    before = signal.getsignal(number)
    with display.Interruption(Console(quiet=True), patient=True) as interruption:
        for _ in range(3):
            signal.raise_signal(number)
        assert interruption.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_sharding_on_a_cpu_is_refused_by_the_command(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="leave out --use_fsdp"):
        launched("cpu")


def test_accelerators_set_up_for_something_else_are_refused(monkeypatch):
    try:
        with pytest.raises(ValueError, match="mixed_precision='bf16'; leave it at 'no'"):
            Accelerated(Accelerator(cpu=True, mixed_precision="bf16"))
        AcceleratorState._reset_state(reset_partial_state=True)
        processes = Accelerated(Accelerator(cpu=True))
        assert processes.device("auto") == processes.device("cpu") == torch.device("cpu")
        with pytest.raises(ValueError, match="device is 'cuda' and the accelerator gave this process 'cpu'"):
            processes.device("cuda")
        processes.accelerator.state.distributed_type = gloo_runs.DistributedType.DEEPSPEED
        with pytest.raises(ValueError, match="the accelerator runs DEEPSPEED"):
            Accelerated(processes.accelerator)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_rows_that_cannot_be_shared_equally_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "processes_of", lambda _: type("Three", (Processes,), {"size": 3})())
    assert cli.main(["train", "--preset", "smoke", "--num-envs", "8", "--out", str(tmp_path / "run")]) == 2
    assert "--num-envs is 8, which 3 processes cannot share equally; choose a multiple of 3" in capsys.readouterr().err
