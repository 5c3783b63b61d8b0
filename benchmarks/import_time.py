"""The cost of ``import tokenmdp`` beside ``import gymnasium``: the best of several fresh interpreters each.

python benchmarks/import_time.py
"""

from __future__ import annotations

import subprocess
import sys

REPEATS = 9


def seconds(module: str) -> float:
    code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True) for _ in range(REPEATS)]
    return min(float(run.stdout) for run in runs)


if __name__ == "__main__":
    theirs, ours = seconds("gymnasium"), seconds("tokenmdp")
    print(f"gymnasium {theirs:.3f} s, tokenmdp {ours:.3f} s, ratio {ours / theirs:.2f}")
