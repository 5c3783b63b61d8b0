"""A run whose process is killed with SIGKILL resumes as if nothing had happened."""

import functools
import os
import signal

import pytest
import torch
from forked import exit_code, needs_fork

from tokenmdp import cli
from tokenmdp.report.curves import read_metrics
from tokenmdp.runs.settings import PRESETS

pytestmark = pytest.mark.usefixtures("curves_not_drawn")

UPDATES = 5  # saved after the second and the fourth
OPTIONS = ["--preset", "smoke", "--num-envs", "4", "--eval-samples", "2", "--device", "cpu", "--dtype", "float32"]
OPTIONS += ["--update-epochs", "2", "--num-minibatches", "2"]
UNTIMED = ("seconds", "tokens_per_second")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_an_update():
    """In the middle of update 4, after 2 of its 4 minibatches: the weights have moved, nothing is saved."""
    steps, step = 0, torch.optim.Adam.step

    def replacement(self, *arguments, **options):
        nonlocal steps
        steps += 1
        if steps > 3 * 4 + 2:
            die()
        return step(self, *arguments, **options)

    torch.optim.Adam.step = replacement


def die_in_a_save():
    """Between the two renames that put the second checkpoint in the place of the first."""
    rename = os.replace

    def replacement(source, target):
        rename(source, target)
        if str(target).endswith("checkpoint.previous"):
            die()

    os.replace = replacement


def arguments(algorithm, out):
    return ["train", algorithm, *OPTIONS, "--updates", str(UPDATES), "--out", str(out)]


@pytest.fixture(scope="module", autouse=True)
def saves_after_every_second_update():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "smoke", PRESETS["smoke"]._replace(checkpoint_every=2))
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Algorithm -> the directory of its whole run."""
    runs = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(algorithm):
        assert cli.main(arguments(algorithm, runs / algorithm)) == 0
        return runs / algorithm

    return run


@needs_fork
@pytest.mark.parametrize(
    ("algorithm", "death", "done"),
    [("ppo", die_in_an_update, 3), ("ppo", die_in_a_save, 4), ("rloo", die_in_an_update, 3)],
)
def test_a_killed_run_ends_with_the_metrics_and_files_of_an_unbroken_one(tmp_path, unbroken, algorithm, death, done):
    out, unbroken = tmp_path / "run", unbroken(algorithm)

    def killed():
        death()
        cli.main(arguments(algorithm, out))

    assert exit_code(killed) == -signal.SIGKILL
    assert len(read_metrics(out / "metrics.jsonl")) == done
    assert cli.main(arguments(algorithm, out)) == 0
    runs = [read_metrics(path / "metrics.jsonl") for path in (out, unbroken)]
    timeless = [[{k: v for k, v in metrics.items() if k not in UNTIMED} for metrics in run] for run in runs]
    assert len(timeless[0]) == UPDATES
    assert timeless[0] == timeless[1]  # to the last bit
    for name in ("model.safetensors", "value_head.safetensors", "state/trainer.safetensors", "state/envs.json"):
        ours, theirs = ((path / "checkpoint" / name).read_bytes() for path in (out, unbroken))
        assert ours == theirs, name
    assert (out / "after.json").read_text() == (unbroken / "after.json").read_text()
