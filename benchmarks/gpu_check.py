"""A CUDA machine checked in six minutes: do the tests pass on it, is it fast, where does the time go?

    python benchmarks/gpu_check.py --out runs/gpu_check
    python benchmarks/gpu_check.py --out runs/smoke --device cpu --smoke      # does it run? tiny sizes, no GPU

Each phase runs in a process of its own, because after an error CUDA may refuse everything else, and writes
``OUT/PHASE.json`` after each finding. A phase that takes longer than its part of the time is stopped and the next one
begins; what it had found stays. With ``--smoke`` all run in this process, without limits. README.md beside this file
says what to look at first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

# Phase -> the function that it runs, and the seconds that it may take.
PHASES = {
    "machine": ("where:described", 40),
    "tests": ("gpu_tests:run", 130),
    "ours": ("speed:ours", 130),
    "plain": ("speed:plain", 60),
    "profile": ("where:profile", 70),
}


def main() -> int:
    arguments = parse()
    if arguments.smoke or arguments.phase is not None:
        for name in arguments.phases if arguments.phase is None else [arguments.phase]:
            run_phase(name, arguments)
        return 0
    end = time.monotonic() + arguments.seconds
    for name in arguments.phases:
        limit = min(PHASES[name][1], end - time.monotonic())
        print(f"{name}: {outcome(name, limit, arguments)}; {arguments.out / name}.json", flush=True)
    return 0


def outcome(name: str, limit: float, arguments: argparse.Namespace) -> str:
    """How a phase ended."""
    if limit < 1:
        return "no time left"
    command = [sys.executable, __file__, "--phase", name, "--out", arguments.out, "--device", arguments.device]
    start = time.monotonic()
    try:
        status = subprocess.run(command, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    return f"{'done' if status == 0 else f'ended with {status}'} in {time.monotonic() - start:.0f} s"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a directory")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes once, to see that it runs")
    parser.add_argument("--seconds", type=float, default=390, help="for all phases together")
    parser.add_argument("--phases", nargs="+", choices=list(PHASES), default=list(PHASES))
    parser.add_argument("--phase", choices=list(PHASES), help="run this one here")
    return parser.parse_args()


def run_phase(name: str, arguments: argparse.Namespace) -> None:
    from importlib import import_module

    import torch
    from gpu_parts.phase import Phase

    arguments.out.mkdir(parents=True, exist_ok=True)
    module, _, function = PHASES[name][0].partition(":")
    phase = Phase(arguments.out / f"{name}.json", torch.device(arguments.device), arguments.smoke)
    getattr(import_module(f"gpu_parts.{module}"), function)(phase)


if __name__ == "__main__":
    sys.exit(main())
