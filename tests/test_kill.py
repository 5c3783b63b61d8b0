"""A run whose process is killed with SIGKILL resumes as if nothing had happened."""

import functools
import signal
import subprocess
import sys

import pytest

from tokenmdp import cli
from tokenmdp.report.curves import read_metrics

UPDATES = 22  # the preset saves after the 10th and the 20th
OPTIONS = ["--preset", "smoke", "--num-envs", "4", "--eval-samples", "2", "--device", "cpu", "--dtype", "float32"]
UNTIMED = ("seconds", "tokens_per_second")
KILL = {
    # In the middle of update 12, after 5 of its 16 minibatches: the weights have moved, nothing is saved.
    "update": """
steps, step = 0, torch.optim.Adam.step
def replacement(self, *arguments, **options):
    global steps
    steps += 1
    if steps > 11 * 16 + 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments, **options)
torch.optim.Adam.step = replacement
""",
    # Between the two renames that put the second checkpoint in the place of the first.
    "save": """
replace = os.replace
def replacement(source, target):
    replace(source, target)
    if str(target).endswith("checkpoint.previous"):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replacement
""",
}


def arguments(algorithm, out):
    return ["train", algorithm, *OPTIONS, "--updates", str(UPDATES), "--out", str(out)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Algorithm -> the directory of its whole run."""
    runs = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(algorithm):
        assert cli.main(arguments(algorithm, runs / algorithm)) == 0
        return runs / algorithm

    return run


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize(
    ("algorithm", "moment", "done"), [("ppo", "update", 11), ("ppo", "save", 20), ("rloo", "update", 11)]
)
def test_a_killed_run_ends_with_the_metrics_and_files_of_an_unbroken_one(tmp_path, unbroken, algorithm, moment, done):
    out, unbroken = tmp_path / "run", unbroken(algorithm)
    program = (
        f"import os, signal, torch\nfrom tokenmdp import cli\n{KILL[moment]}\ncli.main({arguments(algorithm, out)!r})"
    )
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
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
