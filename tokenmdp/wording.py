"""Wording for messages and reports."""

from __future__ import annotations


def count(number: int, thing: str) -> str:
    """A number with its noun, in the plural where needed.

    >>> count(1, "thread"), count(2, "thread")
    ('1 thread', '2 threads')
    """
    return f"{number} {thing}{'' if number == 1 else 's'}"


def clock(seconds: float) -> str:
    """A duration as minutes and seconds.

    >>> clock(75.4)
    '1:15'
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
