"""Finished episodes, ready for an update: played, decoded, and continued from their prefixes."""

from tokenmdp.rollouts.collecting import collect

__all__ = ["collect"]
