"""Dataclasses whose values are checked by the types that their fields declare."""

from __future__ import annotations

import math
from dataclasses import fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_types(settings: Any) -> None:
    """Check every field of a dataclass by its declared type, for use in ``__post_init__``.

    Types may be bool, int, float, str, a Literal of these, or one of them ``| None``. An int is good where a float is
    declared, and NumPy's numbers where Python's are, which they become; a bool is neither. Floats are finite.

    Args:
        settings: The instance, which may be frozen.

    Raises:
        ValueError: a value of another type, an infinity or NaN, or none of the choices; the message names the field.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Sampling:
    ...     top_k: int = 0
    ...     temperature: float | None = 1.0
    ...     def __post_init__(self): check_types(self)
    >>> Sampling(temperature=1)
    Sampling(top_k=0, temperature=1.0)
    >>> Sampling(top_k=2.5)
    Traceback (most recent call last):
    ValueError: top_k is 2.5; it must be a whole number
    """
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        value = getattr(settings, field.name)
        object.__setattr__(settings, field.name, _checked(field.name, value, hints[field.name]))


def require(settings: Any, names: str, allowed: str) -> None:
    """Check the range of several numbers; None passes, where the type allows it.

    Args:
        settings: The dataclass.
        names: Its fields, separated by blanks.
        allowed: "positive", "not negative" or "in [0, 1]".

    Raises:
        ValueError: a number out of range; the message names the field.
    """
    for name in names.split():
        value = getattr(settings, name)
        if value is None or {"positive": value > 0, "not negative": value >= 0, "in [0, 1]": 0 <= value <= 1}[allowed]:
            continue
        switch = ", or None to switch it off" if NoneType in _choices(get_type_hints(type(settings))[name]) else ""
        verb = "must lie in [0, 1]" if allowed == "in [0, 1]" else f"must be {allowed}".replace("be not", "not be")
        raise ValueError(f"{name} is {value}; it {verb}{switch}")


def _choices(declared: Any) -> tuple[Any, ...]:
    return get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)


def _checked(name: str, value: Any, declared: Any) -> Any:
    choices = _choices(declared)
    if value is None and NoneType in choices:
        return value
    (kind,) = (choice for choice in choices if choice is not NoneType)
    if get_origin(kind) is Literal:
        if isinstance(value, str) and value in get_args(kind):
            return value
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(str, get_args(kind)))}")
    is_bool = isinstance(value, bool)
    if kind is float and isinstance(value, Real) and not is_bool:
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}; it must be finite")
        return float(value)
    if kind is int and isinstance(value, Integral) and not is_bool:
        return int(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    needed = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}[kind]
    raise ValueError(f"{name} is {value!r}; it must be {needed}{', or None' if NoneType in choices else ''}")
