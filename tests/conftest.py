"""What becomes of the tests where an optional library is not installed: they are skipped, and say what they need."""

import re
from importlib.util import find_spec

import pytest

EXTRAS = {"attribution": "captum", "datasets": "datasets", "sb3": "sb3_contrib", "torchrl": "torchrl"}
MISSING = {extra for extra, library in EXTRAS.items() if find_spec(library) is None}

collect_ignore = ["sb3_ledger.py"] if "sb3" in MISSING else []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Skip a test in which this package has refused to work without an extra, as its error messages name it."""
    report = yield
    named = re.findall(r"tokenmdp\[(\w+)\]", str(call.excinfo.value)) if report.failed else []
    if MISSING & set(named):
        path, line, _ = item.location
        report.outcome, report.longrepr = "skipped", (path, line, f"needs an extra: pip install 'tokenmdp[{named[0]}]'")
    return report
