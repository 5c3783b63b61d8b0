"""One thread per process, single precision; tests that need a library which is not installed are skipped and say so."""

import os
import re
import signal
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

# Before PyTorch is imported; the processes of tests inherit it. Numbers differ in the last bits between thread
# counts, and tests run beside each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Bounds are of float32; tests of bfloat16 ask for it, and so run on every machine.
os.environ.setdefault("TOKENMDP_DTYPE", "float32")

# What nohup and a shell's & ignore, processes inherit; tests send these signals.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

EXTRAS = {
    "attribution": "captum",
    "datasets": "datasets",
    "sb3": "sb3_contrib",
    "study": "sacrebleu",
    "torchrl": "torchrl",
}
MISSING = {extra for extra, library in EXTRAS.items() if find_spec(library) is None}

# A device that the CPU plays stays in the process that imports it, so only test_device_placement.py's child does.
collect_ignore = ["pretend_device.py", "placement_runs.py", *(["sb3_ledger.py"] if "sb3" in MISSING else [])]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Skip a test in which this package refuses to work without an extra that its error message names."""
    report = yield
    named = set(re.findall(r"tokenmdp\[(\w+)\]", _messages(call.excinfo.value))) if report.failed else set()
    for extra in sorted(MISSING & named):
        path, line, _ = item.location
        report.outcome, report.longrepr = "skipped", (path, line, f"needs an extra: pip install 'tokenmdp[{extra}]'")
    return report


def _messages(error: BaseException | None) -> str:
    """The messages of an exception and of the exceptions being handled when it was raised."""
    return "" if error is None else f"{error}\n{_messages(error.__cause__ or error.__context__)}"


@pytest.fixture
def curves_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without the picture of their curves: to draw it takes longer than a small run."""
    monkeypatch.setattr("tokenmdp.report.curves.plot_learning_curves", lambda runs, path, **options: path)
