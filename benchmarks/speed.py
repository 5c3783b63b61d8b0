"""How fast the PPO agent is: against TRL, against ``generate``, and against what the machine can multiply.

    python benchmarks/speed.py --out runs/speed.json                      # every part
    python benchmarks/speed.py generate flops --shapes 4x256 --threads 2  # some parts, one shape

README.md beside this file says what each part measures. Ratios come from runs that alternate in one call. A ratio that
misses its mark is reported as such and is not an error.
"""

from __future__ import annotations

import sys

from tokenmdp.runs.process_settings import reexecute_with_settings

if __name__ == "__main__":
    if "--no-reexec" not in sys.argv:
        reexecute_with_settings()  # before PyTorch is imported: the allocator reads its settings only at the start
    from speed_parts.command import main

    main()
