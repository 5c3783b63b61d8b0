"""``tokenmdp soup``: weighted sums of two policies' weights, evaluated on every objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from tokenmdp.cli.checks import check_directory, check_numbers
from tokenmdp.cli.options import parse
from tokenmdp.report import front
from tokenmdp.runs.display import make_console
from tokenmdp.runs.environments import resolve_device
from tokenmdp.runs.opening import open_source
from tokenmdp.runs.settings import absolute_name
from tokenmdp.runs.soups import soups, table, weights_of


@dataclass(frozen=True)
class SoupOptions:
    """Average the weights of two policies that were trained from one start, and evaluate each soup.

    Run the same command again to go on after an interruption.
    """

    first: tyro.conf.Positional[str]
    """A run directory, or the directory of a model."""
    second: tyro.conf.Positional[str]
    """The other one: a run directory, or the name or directory of a model."""
    weights: str = "0:1:0.25"
    """Of the second one: FIRST:LAST:STEP, or numbers with commas between them; those outside 0 to 1 extrapolate."""
    reward_model: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An objective: bundled name, directory or hub name of a reward model; may be repeated. Default: the runs' own."""
    start: str | None = None
    """The policy that the KL is measured to. Default: what the first run started from."""
    samples: int = 256
    """Responses of each soup."""
    device: str = "auto"
    """Where it runs: cpu, cuda, cuda:1; auto is cuda if there is one."""
    out: Path = Path("runs/soup")
    """Directory of the soups, each of which is a model."""


def main(arguments: Sequence[str]) -> int:
    """Parse, average and evaluate; returns the exit status."""
    options = parse(SoupOptions, "soup", arguments)
    check_numbers(options, samples=2)
    check_directory(options.out)
    weights = weights_of(options.weights)
    console = make_console()
    (first, settings), (second, other) = open_source(options.first), open_source(options.second)
    members = absolute_name(first) or first, absolute_name(second) or second
    objectives = list(dict.fromkeys(options.reward_model or (settings.reward_model, other.reward_model)))
    objectives = [absolute_name(name) or name for name in objectives]
    if options.start is None and not (settings.reference is other.reference is None):
        raise ValueError(
            "a run was given --reference, so its checkpoint does not say what it was trained from; pass --start with "
            "that policy"
        )
    start = options.start or _start(members[0])
    settings = replace(settings, credit="sparse", credit_options={}, device=resolve_device(options.device))
    points = soups(members, settings, weights, objectives, start, options.samples, options.out, console)
    names = [_short(name) for name in objectives]
    console.print(table(points, objectives, names))
    if len(objectives) > 1:
        marks = [
            front.Mark(f"{point.weight:g}", point.score(objectives[0]), point.score(objectives[1]), point.kl.value)
            for point in points
        ]
        title = f"soups: weight of {_short(options.second)}, {options.samples} responses each; bars: 95% intervals"
        path = front.draw(marks, options.out, "front", xlabel=names[0], ylabel=names[1], title=title)
        console.print(f"front: {path}", highlight=False, soft_wrap=True)
    for point in points:
        console.print(f"weight {point.weight:g}: {point.directory}", highlight=False, soft_wrap=True)
    return 0


def _start(member: str) -> str:
    reference = Path(member) / "state" / "reference"
    if not reference.is_dir():
        raise ValueError(f"{member} does not say what it was trained from; pass --start with that policy")
    return str(reference)


def _short(name: str) -> str:
    path = Path(name)
    return path.parent.name if path.name == "checkpoint" else path.name
