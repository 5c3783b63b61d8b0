"""The peak of a process against what is resident now."""

import sys
from pathlib import Path

import pytest
import torch

from tokenmdp.training import peak_memory
from tokenmdp.training.peak_memory import peak_bytes

CPU = torch.device("cpu")
MEBIBYTE = 2**20
SLACK = 2 * MEBIBYTE  # the kernel counts pages in batches


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_at_least_what_is_resident_and_stays_when_it_is_given_back():
    import resource

    held = torch.ones(64 * MEBIBYTE, dtype=torch.uint8)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    peak = peak_bytes(CPU)
    assert peak >= resident - SLACK
    del held
    assert peak_bytes(CPU) >= peak - SLACK


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_kernel_that_does_not_tell_the_peak_is_asked_another_way(tmp_path, monkeypatch):
    import resource

    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmRSS:\t10 kB\n")
    monkeypatch.setattr(peak_memory, "STATUS", status)
    least = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak_bytes(CPU) >= least > 0
