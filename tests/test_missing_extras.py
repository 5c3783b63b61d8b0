"""The tests where no optional library is installed: nothing fails, and what is left out says what it needs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXTRAS

TESTS = Path(__file__).parent
HIDING = f"""
import sys
from importlib.machinery import PathFinder

hidden = {{*{sorted(EXTRAS.values())}, "stable_baselines3", "tensordict", "pyarrow"}}

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)

sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture
def run_pytest(tmp_path):
    """Runs pytest in a process that finds none of the extras; returns what it prints."""
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(*arguments):
        command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


@pytest.mark.slow
def test_everything_is_collected(run_pytest):
    collected = run_pytest("--co", TESTS, "--pyargs", "tokenmdp")
    assert "test_interop_arrays.py::" in collected
    assert "interop/arrays.py::" in collected  # a doctest
    assert "interop/sb3" not in collected
    assert "test_interop_sb3" not in collected


@pytest.mark.slow
def test_what_needs_an_extra_is_skipped_and_names_it(run_pytest):
    chosen = ("test_evaluation", "test_wrapper_checks", "test_interop_torchrl", "test_interop_sb3", "test_attribution")
    output = run_pytest("-rs", *(TESTS / f"{name}.py" for name in chosen))
    skipped = re.findall(r"^SKIPPED .*?: (.+)$", output, re.M)
    assert all("tokenmdp[" in reason for reason in skipped), skipped
    assert {name for reason in skipped for name in re.findall(r"tokenmdp\[(\w+)\]", reason)} >= {
        "sb3", "torchrl", "attribution",
    }  # fmt: skip
    assert int(re.search(r"(\d+) passed", output)[1]) > 60
