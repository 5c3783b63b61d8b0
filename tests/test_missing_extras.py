"""The tests where no optional library is installed: nothing fails, and what is left out says what it needs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXTRAS

TESTS = Path(__file__).parent
NAMES = re.compile("|".join([*EXTRAS.values(), "stable_baselines3", "tensordict", "pyarrow", "sb3_ledger", "interop"]))
CONCERNED = [file for file in sorted(TESTS.glob("test_*.py")) if NAMES.search(file.read_text(encoding="utf-8"))]
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


@pytest.mark.slow
def test_everything_is_collected_and_what_needs_an_extra_is_skipped_and_names_it(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    chosen = "test_wrapper_checks.py or signs_differ or misuse_is_explained or interop.arrays"
    command = [sys.executable, "-m", "pytest", "-v", "-rs", "-n0", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [*command, *CONCERNED, "--pyargs", "tokenmdp"],
        cwd=TESTS.parent, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    output = done.stdout
    assert done.returncode == 0, output  # so every file was collected that an extra can concern
    assert "test_interop_arrays.py::" in output
    assert "interop/arrays.py::" in output  # a doctest
    assert "interop/sb3" not in output
    assert "test_interop_sb3.py::" not in output
    skipped = re.findall(r"^SKIPPED .*?: (.+)$", output, re.M)
    assert all("tokenmdp[" in reason for reason in skipped), skipped
    assert {name for reason in skipped for name in re.findall(r"tokenmdp\[(\w+)\]", reason)} >= {
        "sb3", "torchrl", "attribution",
    }  # fmt: skip
    assert int(re.search(r"(\d+) passed", output)[1]) > 20
