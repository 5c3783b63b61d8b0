"""TRL 0.11.4 in a virtual environment of its own, and a process in it that waits to be asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tokenmdp.files import write_text
from tokenmdp.runs.process_settings import SETTINGS

# The last TRL with PPOTrainer(step(queries, responses, scores)), and what it still works with.
PINS = (
    "torch==2.13.0", "trl==0.11.4", "transformers==4.46.3", "datasets<3.3", "pyarrow<20", "numpy<2", "rich",
)  # fmt: skip
WORKER = Path(__file__).with_name("trl_worker.py")
MARK = "tokenmdp-pins.json"


def default_directory() -> Path:
    """The directory of the environment, kept for the next time: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "tokenmdp" / "trl-0.11.4"


def make_environment(directory: Path) -> Path:
    """The environment's Python; installs ``PINS`` unless a finished installation of them exists.

    pip's own settings apply: on Linux ``PIP_EXTRA_INDEX_URL`` can point to PyTorch's index of builds without CUDA.

    Raises:
        subprocess.CalledProcessError: pip failed; it has printed why.
    """
    folder, program = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    python, mark = directory / folder / program, directory / MARK
    if mark.exists() and json.loads(mark.read_text()) == list(PINS):
        return python
    Console(stderr=True).print(f"installing {' '.join(PINS)} into {directory}", soft_wrap=True, markup=False)
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *PINS], check=True)
    write_text(mark, json.dumps(PINS))
    return python


def as_it_comes(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment variables without the allocator settings of the ``tokenmdp`` command.

    >>> as_it_comes({"HOME": "/home", "MALLOC_MMAP_MAX_": "0"})
    {'HOME': '/home'}
    """
    return {key: value for key, value in environ.items() if key not in SETTINGS}


class TRLProcess:
    """A process that runs one PPO iteration of TRL each time it is asked; use it in a ``with`` block."""

    def __init__(self, python: Path, order: dict[str, Any], environ: dict[str, str] | None = None) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  open as long as the process
        # -I: the other environment must see neither this project nor the user's own packages.
        self.process = subprocess.Popen(
            [python, "-I", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environ,
        )
        self.versions: dict[str, str] = self.ask({"command": "start", **order})["versions"]

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Send an order and wait for the answer.

        Raises:
            RuntimeError: the process ended; with the end of what it printed.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        answer = ""
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            pass
        if not answer:
            self.log.seek(0)
            raise RuntimeError(f"the TRL process ended with {self.process.wait()}:\n{self.log.read()[-3000:]}")
        return json.loads(answer)

    def iteration(self) -> dict[str, Any]:
        """One PPO iteration: its seconds and response tokens, its texts with their scores, and its statistics."""
        return self.ask({"command": "iteration"})

    def scores(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Scores of whole texts (token ids each) by the other side's reward model."""
        return self.ask({"command": "score", "texts": texts})["scores"]

    def __enter__(self) -> TRLProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()
