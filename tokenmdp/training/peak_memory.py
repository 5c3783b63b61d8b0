"""The most memory that this process has held."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def peak_bytes(device: torch.device) -> float:
    """Since the process began: what PyTorch allocated on a CUDA ``device``, else what was resident on the host.

    NaN for the host on Windows, where Python does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # First this: ru_maxrss counts the parent as it was when it forked. Some containers' kernels have no such line.
    if STATUS.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())):
        return 1024 * int(found[1])
    if sys.platform == "win32":
        return float("nan")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
