"""Memory settings that are read only when a process starts.

By default glibc gives large tensors back to the kernel at every free, and the page faults on the next allocation can
take up to half of a training step on a CPU; the first two variables keep the memory. The third lets PyTorch ask the
kernel for huge pages: reading a long cache of keys and values in small ones costs a third more time. The variables must
be there before Python starts: the ``tokenmdp`` command therefore re-executes itself with them set. A program that
uses the library is never re-executed; export the variables in the shell to have them there.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping

SETTINGS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8589934592", "THP_MEM_ALLOC_ENABLE": "1"}
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
