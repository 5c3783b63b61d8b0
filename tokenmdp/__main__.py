"""``python -m tokenmdp``: the ``tokenmdp`` command."""

import sys

from tokenmdp.cli import main

if __name__ == "__main__":
    sys.exit(main())
