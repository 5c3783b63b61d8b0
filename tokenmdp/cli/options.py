"""What the commands share: how options are read, and options made from the fields of a configuration."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

# The names of `tokenmdp.credit.CREDIT_METHODS`, for the type checker.
CreditName = Literal[
    "sparse",
    "uniform",
    "position",
    "attention",
    "abc-d",
    "abc-d2",
    "red",
    "integrated-gradients",
    "deeplift",
    "shapley",
    "owen",
    "fine-grained",
    "rto",
]
AllOrOne = Literal["all", CreditName]  # one Literal: of a union of two the parser would list the names unordered
# An option of several commands; each says behind its field what leaving it out means.
ScoreChoice = Annotated[
    str | None, 'Which output of the reward model is the score: an index, a label or "LABEL - LABEL".'
]
Options = TypeVar("Options")
DEFAULT = re.compile(r"\s*\bDefault: (.+?)\.$")  # at the end of a description, where the value itself says nothing


def parse(options: type[Options], command: str, arguments: Sequence[str]) -> Options:
    """The options of a command; a wrong one prints its usage and exits with status 2.

    Args:
        options: A dataclass with a default for every option.
        command: Words before the options, such as "score".
        arguments: What follows them.
    """
    (parsed,) = parse_parts(command, arguments, inspect.getdoc(options) or "", {"general": option_class(options)})
    return options(**parsed)


def parse_parts(
    command: str, arguments: Sequence[str], about: str, parts: Mapping[str, Any]
) -> tuple[dict[str, Any], ...]:
    """As `parse`, for options in several groups.

    Args:
        command: Words before the options.
        arguments: What follows them.
        about: What ``--help`` says first.
        parts: Title of a group -> a class from `option_class`, or an instance of one, whose values are the defaults.

    Returns:
        The values of each group.
    """
    classes = {title: part if isinstance(part, type) else type(part) for title, part in parts.items()}
    groups: list[Any] = [(title, Annotated[kind, tyro.conf.OmitArgPrefixes]) for title, kind in classes.items()]
    whole: Any = make_dataclass("Whole", groups)
    given = {} if any(isinstance(part, type) for part in parts.values()) else {"default": whole(**parts)}
    parsed = tyro.cli(whole, prog=f"tokenmdp {command}", description=about, args=list(arguments), **given)
    return tuple(
        {field.name: getattr(part, field.name) for field in fields(part)}
        for part in (getattr(parsed, title) for title in parts)
    )


def option_class(kind: type, left_out: Collection[str] = ()) -> Any:
    """A dataclass with the fields of ``kind`` that are options, described as its source describes them.

    Args:
        kind: A dataclass.
        left_out: Fields that are not options.
    """
    hints, described = get_type_hints(kind, include_extras=True), descriptions(kind)
    options: list[Any] = []
    for one in fields(kind):
        if one.name in left_out:
            continue
        text = described[one.name]
        hint: dict[str, Any] = (
            {"help_behavior_hint": f"(default: {found[1]})"} if (found := DEFAULT.search(text)) else {}
        )
        shown = tyro.conf.arg(help=DEFAULT.sub("", text), **hint)
        options.append((one.name, Annotated[_in_order(hints[one.name]), shown], field(default=one.default)))
    return make_dataclass(kind.__name__, options, kw_only=True, frozen=True, namespace={"__doc__": " "})


def _in_order(hint: Any) -> Any:
    """Choices or None as one Literal: the parser lists the choices of a union in any order.

    >>> _in_order(Literal["left", "right"] | None)
    typing.Literal[None, 'left', 'right']
    """
    parts = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else ()
    choices = [part for part in parts if get_origin(part) is Literal]
    return Literal[(None, *get_args(choices[0]))] if choices and {*parts} == {choices[0], NoneType} else hint


def as_options(values: Any, left_out: Collection[str] = ()) -> Any:
    """An instance of `option_class` with the values of a dataclass instance: the defaults for `parse_parts`."""
    made = option_class(type(values), left_out)
    return made(**{one.name: getattr(values, one.name) for one in fields(made)})


def preset_in(arguments: Sequence[str], presets: Collection[str]) -> Any:
    """The preset that some arguments name, whose values are the other options' defaults; "quick" without one.

    >>> preset_in(["--seed", "2", "--preset=smoke"], ["quick", "smoke"]), preset_in(["--preset", "smke"], ["quick"])
    ('smoke', 'quick')
    >>> preset_in([], ["quick"])
    'quick'
    """
    name = value_in(arguments, "--preset")
    return name if name in presets else "quick"  # of a wrong name parsing says what there is


def value_in(arguments: Sequence[str], flag: str) -> str | None:
    """The value of an option before the options are parsed; None: it is not there.

    >>> value_in(["--plan", "mine.json"], "--plan"), value_in(["--plan=mine.json"], "--plan"), value_in([], "--plan")
    ('mine.json', 'mine.json', None)
    """
    for word, following in pairwise([*arguments, ""]):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None


@cache
def descriptions(kind: type) -> dict[str, str]:
    """What the source of a dataclass, and of those that it inherits from, says about each field.

    That is the text below the field, as in `tokenmdp.cli.train.Train`, or the comment behind it, as in the
    configurations of algorithms, behind what the field's type says of itself, as `ScoreChoice` does; "" where there is
    none.
    """
    found: dict[str, str] = {}
    for one in reversed([parent for parent in kind.__mro__ if is_dataclass(parent)]):
        source = textwrap.dedent(inspect.getsource(one))
        lines, body = source.splitlines(), ast.parse(source).body[0].body  # type: ignore[attr-defined]
        for node, following in zip(body, [*body[1:], None], strict=True):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            behind = lines[node.end_lineno - 1][node.end_col_offset :]  # type: ignore[operator]
            text = behind.strip().removeprefix("#").strip()
            text = text[:1].upper() + text[1:]
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text = str(following.value.value)
            found[node.target.id] = " ".join(text.split())
    for name, hint in get_type_hints(kind, include_extras=True).items():
        of_the_type = [about for about in getattr(hint, "__metadata__", ()) if isinstance(about, str)]
        if name in found:
            found[name] = " ".join([*of_the_type, found[name]]).strip()
    return found
