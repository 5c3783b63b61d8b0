"""Checks of the options of credit methods, so that a wrong value is refused where it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from numbers import Integral, Real
from typing import Any


def check_whole(name: str, value: object, least: int | None = None, choices: Sequence[str] = ()) -> None:
    """Refuse what is neither a whole number of at least ``least`` nor one of ``choices``; True is not a number.

    >>> check_whole("steps", 32, 1)
    >>> check_whole("heads", "mean", 0, ("mean", "max"))

    Raises:
        ValueError: with the value and what is allowed.
    """
    if isinstance(value, str) and value in choices:
        return
    if not isinstance(value, Integral) or isinstance(value, bool) or (least is not None and value < least):
        number = "a whole number" if least is None else f"a whole number, at least {least}"
        others = ", ".join(map(repr, choices)) + " or " if choices else ""
        raise ValueError(f"{name} is {value!r}; choose {others}{number}")


def check_number(name: str, value: object) -> None:
    """Refuse what is not a real number, before it is compared with its range.

    >>> check_number("clip", 1)

    Raises:
        ValueError: with the value.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be a number")


def required_options(method: type[Any]) -> list[str]:
    """The options of a credit method that have no default.

    >>> from tokenmdp.credit import AttentionCredit, ImplicitRewardCredit
    >>> required_options(AttentionCredit), required_options(ImplicitRewardCredit)
    ([], ['tuned'])
    """
    return [field.name for field in fields(method) if field.default is MISSING and field.default_factory is MISSING]
