"""Settings of the process: memory and spinning, which are read only when it starts, and how many threads it takes.

By default glibc gives large tensors back to the kernel at every free, and the page faults on the next allocation can
take up to half of a training step on a CPU; the first two variables keep the memory. The third lets PyTorch ask the
kernel for huge pages: reading a long cache of keys and values in small ones costs a third more time. The last bounds
how long OpenMP's threads spin while they wait for each other, which wastes the core of whatever else runs there. The
variables must be there before Python starts: the ``tokenmdp`` command therefore re-executes itself with them set. A
program that uses the library is never re-executed; export the variables in the shell to have them there.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "THP_MEM_ALLOC_ENABLE": "1",
    "GOMP_SPINCOUNT": "10000",
}
THREADS_CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by the user, or by a launcher of several processes
CGROUP = Path("/sys/fs/cgroup")
STAT = Path("/proc/stat")
REEXECUTED = "TOKENMDP_REEXECUTED"  # its presence ends the recursion


def missing_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The settings to add to ``environ``; empty where they would do nothing, are set already, or were added before.

    >>> missing_settings({"TOKENMDP_REEXECUTED": "1"})
    {}
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or REEXECUTED in environ:
        return {}
    return {key: value for key, value in SETTINGS.items() if key not in environ}


def reexecute_with_settings() -> None:
    """Replace this process by the same command with the settings; returns if nothing needs to change."""
    missing = missing_settings(os.environ)
    if missing:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing, REEXECUTED: "1"})


def describe(environ: Mapping[str, str]) -> str:
    """One line for the log.

    >>> describe({"MALLOC_MMAP_MAX_": "0"})
    'allocator: MALLOC_MMAP_MAX_=0'
    """
    present = " ".join(f"{key}={environ[key]}" for key in SETTINGS if key in environ)
    if not present:
        return "allocator: system defaults"
    by_us = " (set by re-executing this command; --no-reexec turns that off)"
    return f"allocator: {present}{by_us if REEXECUTED in environ else ''}"


def allowed_cores() -> int:
    """Cores that this process may use: its affinity, or less where a control group has a quota."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = _quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def free_cores() -> int:
    """Cores of the machine that are not busy, at most `allowed_cores` and at least 1.

    Busy is what was busy during the last minute and still is: the load goes on for a while after a program has ended.
    Or it is what others have kept busy since this process began, which the load of a minute hardly shows. A program
    that still loads keeps one core busy, whatever it takes later.
    """
    load = os.getloadavg()[0] if sys.platform != "win32" else 0.0
    cores = os.cpu_count() or 1
    busy = max(min(load, busy_now()) if load >= 0.5 else 0.0, busy_beside())
    return max(1, min(allowed_cores(), math.floor(cores - busy + 0.5)))


def ticks() -> tuple[int, int]:
    """The machine's clock ticks since it started, over all cores: all of them, and those idle or waiting for a disk.

    Raises:
        OSError, ValueError, IndexError: the system does not say.
    """
    numbers = [int(number) for number in STAT.read_text(encoding="ascii").splitlines()[0].split()[1:9]]
    return sum(numbers), numbers[3] + numbers[4]


def busy_now(seconds: float = 0.3) -> float:
    """How many cores of the machine compute, over some tenths of a second; infinity: the system does not say."""
    try:
        before = ticks()
        time.sleep(seconds)
        return busy_between(before, ticks())
    except (OSError, ValueError, IndexError):
        return math.inf


def busy_between(before: tuple[int, int], after: tuple[int, int]) -> float:
    """How many cores of the machine computed between two readings of `ticks`, on average."""
    everything, idle = (new - old for new, old in zip(after, before, strict=True))
    return (os.cpu_count() or 1) * (1 - idle / everything) if everything else 0.0


class Start(NamedTuple):
    """When a process began to load this library."""

    ticks: tuple[int, int]
    own: float  # CPU seconds that the process had used by then
    clock: float  # seconds

    @classmethod
    def now(cls) -> Start | None:
        """None: the system does not say."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return cls(ticks(), time.process_time(), time.monotonic())
        return None


START = Start.now()


def busy_beside(start: Start | None = START) -> float:
    """How many cores others have kept busy since ``start``, on average.

    0 where that was less than a second ago, which says little, or more than a minute ago: the load says that better.
    """
    now = Start.now()
    if start is None or now is None or not 1 <= (seconds := now.clock - start.clock) <= 60:
        return 0.0
    return max(0.0, busy_between(start.ticks, now.ticks) - (now.own - start.own) / seconds)


def thread_count(environ: Mapping[str, str], before: int | None) -> tuple[int | None, str]:
    """How many threads PyTorch should take, and why; None: as it does by itself.

    Args:
        environ: `THREADS_CHOSEN` in it overrule everything.
        before: threads with which the run began. Other threads add numbers in another order, so that a resumed run
            would differ from an unbroken one in the last bits.
    """
    if chosen := [name for name in THREADS_CHOSEN if name in environ]:
        return None, f"as {chosen[0]} says"
    if before is not None:
        return before, "as when the run began"
    allowed, free = allowed_cores(), free_cores()
    if free < allowed:
        return free, f"the others of {allowed} cores are busy; OMP_NUM_THREADS chooses"
    return None, ""


def _quota() -> float | None:
    """The quota of the control group in cores, version 2 or 1; None: there is none."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = ((CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if int(quota) < 0 else int(quota) / int(period)
    return None
