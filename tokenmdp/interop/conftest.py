"""What pytest does not look into for doctests where an optional library is missing, in an installed package too."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("sb3_contrib") else ["sb3"]
