"""Training on a machine that is quiet, that has two busy loops, or that has two runs at once.

    python benchmarks/busy_machine.py --updates 20
    python benchmarks/busy_machine.py --updates 20 --only "two runs at once"

Prints response tokens per second and their ratio to the quiet run, with the command's own settings (re-executed with a
bounded spin, threads by what is free) and with one thread. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

MACHINES = {"quiet": (0, 1), "two busy loops": (2, 1), "two runs at once": (0, 2)}  # busy loops, runs
LOAD_SECONDS = 60  # how long the load average looks back


def start(out: Path, updates: int, threads: str | None) -> subprocess.Popen[bytes]:
    """One run of the bundled model, in the background."""
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = threads
    command = [sys.executable, "-m", "tokenmdp", "train", "--updates", str(updates), "--eval-samples", "2"]
    return subprocess.Popen([*command, "--out", str(out)], env=environment, stdout=subprocess.DEVNULL)


def speed(out: Path) -> float:
    """Median response tokens per second, the first two updates left out."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(record["tokens_per_second"] for record in records[2:])


@contextlib.contextmanager
def busy(loops: int) -> Iterator[None]:
    """That many processes that do nothing but take a core, from a minute before the block on."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        time.sleep(LOAD_SECONDS if loops else 0)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    """Run all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=list(MACHINES), default=list(MACHINES), metavar="MACHINE")
    options = parser.parse_args()
    print("| machine | threads | tokens/s | of the quiet run |", "|---|---|---|---|", sep="\n")
    quiet: dict[str | None, float] = {}
    with tempfile.TemporaryDirectory() as name:
        for machine in options.only:
            loops, runs = MACHINES[machine]
            for threads in (None, "1"):
                outs = [Path(name) / f"{machine}-{threads}-{number}" for number in range(runs)]
                with busy(loops):
                    for process in [start(out, options.updates, threads) for out in outs]:
                        process.wait()
                total = sum(speed(out) for out in outs)
                if machine == "quiet":
                    quiet[threads] = total
                share = f"{total / quiet[threads]:.2f}" if threads in quiet else ""
                print(f"| {machine} | {threads or 'default'} | {total:.0f} | {share} |", flush=True)


if __name__ == "__main__":
    main()
