"""Files that pytest skips for doctests where an optional library is missing, also in an installed package."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("sb3_contrib") else ["sb3"]
