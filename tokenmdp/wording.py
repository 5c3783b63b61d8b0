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


def visible(text: str) -> str:
    r"""A message with its control characters written out, which could clear the reader's screen: a path may hold any.

    >>> print(visible("runs/\x1b[2J"))
    runs/\x1b[2J
    """
    return "".join(mark if mark.isprintable() or mark in "\n\t" else repr(mark)[1:-1] for mark in text)
