"""What is learned per update, and how long it takes: our PPO beside TRL 0.11.4's, on the bundled models.

    python benchmarks/learning.py curves --out runs/learning     # learning curves of both, seeds 1 to 3
    python benchmarks/learning.py time --out runs/learning       # seconds until a mean score is reached, in turn
    python benchmarks/learning.py report --out runs/learning     # tables and figure of what is there

README.md beside this file says what is the same on both sides and what differs.
"""

from __future__ import annotations

import signal
import sys

from tokenmdp.runs.process_settings import reexecute_with_settings

if __name__ == "__main__":
    if "--no-reexec" not in sys.argv:
        reexecute_with_settings()  # before PyTorch is imported: the allocator reads its settings only at the start
    from learning_parts.command import main

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception ends the processes that were started
    sys.exit(main())
