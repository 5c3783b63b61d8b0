"""The tests marked gpu, each with its outcome and what it recorded: parity with the CPU, saving, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_parts.phase import Phase

TESTS = Path(__file__).resolve().parents[2] / "tests"
FILES = ("test_policy.py", "test_ppo.py", "test_on_cuda.py")


class Recorder:
    """A plugin of pytest that writes every result as it comes."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called for set-up, call and tear-down of each test."""
        if report.when == "call" or report.outcome != "passed":
            finding = {"outcome": report.outcome, "seconds": round(report.duration, 2), **dict(report.user_properties)}
            if report.failed:
                finding["error"] = str(report.longrepr)[-3000:]
            self.phase.add(report.nodeid.rpartition("/")[2], finding)


def run(phase: Phase) -> None:
    """In this process, without the project's options, some of which need other plugins."""
    import pytest

    files = [str(TESTS / name) for name in (FILES[-1:] if phase.smoke else FILES)]
    options = ["-q", "-o", "addopts=", "-m", "gpu", "-p", "no:cacheprovider"]
    phase.add("exit status", int(pytest.main([*options, *files], plugins=[Recorder(phase)])))
