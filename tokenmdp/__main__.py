"""``python -m tokenmdp``: the ``tokenmdp`` command, in each process of ``accelerate launch -m tokenmdp train ...``."""

import os
import sys

from tokenmdp.cli import main

if __name__ == "__main__":
    # What a launcher has started is not re-executed with other settings: that is for single-process commands.
    sys.exit(main(sys.argv[1:] if "WORLD_SIZE" in os.environ else None))
