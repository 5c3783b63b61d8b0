"""The most memory that this process has held."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch


def peak_bytes(device: torch.device) -> float:
    """Since the process began: what PyTorch allocated on a CUDA ``device``, else what was resident on the host.

    NaN where the system does not say (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent as it was when it forked
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])  # type: ignore[index]
    if sys.platform == "win32":
        return float("nan")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
